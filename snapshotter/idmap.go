package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func idmapLabels(info snapshots.Info) (uidmap, gidmap string) {
	return info.Labels[snapshots.LabelSnapshotUIDMapping], info.Labels[snapshots.LabelSnapshotGIDMapping]
}

// noID is the id that no file has, (uid_t)-1: chown(2) takes it for "as it is".
const noID = 1<<32 - 1

// mappedRoot is the host's id of the container's root in a mapping of the form
// "container:host:size,...". Ids have 32 bits: kubelet hands out all of them.
func mappedRoot(mapping string) (int, error) {
	for m := range strings.SplitSeq(mapping, ",") {
		part := strings.Split(m, ":")
		if len(part) != 3 {
			return 0, fmt.Errorf("%q is not container-id:host-id:size", m)
		}
		var n [3]uint64
		for i, p := range part {
			var err error
			if n[i], err = strconv.ParseUint(p, 10, 32); err != nil {
				return 0, err
			}
		}
		if n[1] == noID {
			return 0, fmt.Errorf("%q: %d is not an ID", m, noID)
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, errors.New("nothing is mapped to id 0")
}

// remapped reports whether containerd has given the chain's files to these owners
// already. It does so if the proxy plugin lacks the capability "remap-ids": then it
// copies the whole image up into a snapshot of its own, changes the owner of each
// file there, and passes the same labels on for the container. To map such a
// chain again would give its files to nobody.
//
// That snapshot is an ordinary one, is not a layer of an image, and its root
// belongs to the user that is root in the container. Where that is the machine's root, the
// owner tells nothing, and the chain is taken as not mapped.
func remapped(links []link, lowers []string, uidmap, gidmap string) (bool, error) {
	if len(links) == 0 || links[0].lazy || links[0].layer {
		return false, nil
	}
	uid, gid, err := rootOf(uidmap, gidmap)
	if err != nil || uid == 0 && gid == 0 {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Stat(lowers[0], &st); err != nil {
		return false, &os.PathError{Op: "stat", Path: lowers[0], Err: err}
	}
	return int(st.Uid) == uid && int(st.Gid) == gid, nil
}

// explainRemapped says once what makes containers with user namespaces slow.
func (s *Snapshotter) explainRemapped(snapshot string) {
	s.remapped.Do(func() {
		s.log.Warn("containerd has copied a whole image to change its owners, for a container with a user namespace; "+
			"to avoid the copy, set capabilities = [\"remap-ids\"] in the section proxy_plugins.shoal of containerd's config", "snapshot", snapshot)
	})
}

// rootOf is the host's ids of the container's root.
func rootOf(uidmap, gidmap string) (uid, gid int, err error) {
	if uid, err = mappedRoot(uidmap); err == nil {
		gid, err = mappedRoot(gidmap)
	}
	if err != nil {
		return -1, -1, fmt.Errorf("id mapping %q, %q: %w: %w", uidmap, gidmap, err, errdefs.ErrInvalidArgument)
	}
	return uid, gid, nil
}
