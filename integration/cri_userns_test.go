package integration

import (
	"archive/tar"
	"fmt"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestPodsWithUserNamespaces: pods with a user namespace (hostUsers: false) start
// lazily, several ranges of one image at once, ids above 2^31 as well; files have
// the right owners, and the image is not copied.
func TestPodsWithUserNamespaces(t *testing.T) {
	for _, v := range (&lab.Lab{Bin: bin(t)}).ContainerdVersions() {
		if v.ConfigVersion < 3 {
			continue // containerd 1.6 does not know user namespaces of pods
		}
		t.Run(v.Name, func(t *testing.T) {
			s := newCRISite(t, v, "", nil)
			ref := s.pushOwned(t)
			noError(t, s.CRI.Pull(t.Context(), ref, nil))
			if !s.isLazy(t, t.Context(), ref) {
				t.Fatalf("the image is not lazy: %s", logLine(t, s.node.Log, ref))
			}
			s.runOwned(t, ref, 200_000, 2_914_516_992, 4_026_400_768)
			if n := s.copied(t); n > 1<<20 {
				t.Errorf("%d bytes of the image were copied", n)
			}
		})
	}
}

// TestPodsWithUserNamespacesWithoutCapability: the same where containerd's config
// lacks the capability "remap-ids": containerd makes a copy, and pods start with the
// right owners all the same.
func TestPodsWithUserNamespacesWithoutCapability(t *testing.T) {
	v := pinned(t)
	s := newCRISite(t, v, "", func(_ *site, o *lab.ContainerdOptions) { o.NoRemap = true })
	ref := s.pushOwned(t)
	noError(t, s.CRI.Pull(t.Context(), ref, nil))
	s.runOwned(t, ref, 200_000, 2_914_516_992)
}

// pushOwned pushes an image that pods can run, with a file /own that has an owner.
func (s *site) pushOwned(t *testing.T) string {
	t.Helper()
	own := file("own", "mine").with(func(h *tar.Header) { h.Uid, h.Gid = 7, 8 })
	return s.push(t, "owned", must(s.Guest())(t), layer(t, own, file("big", bigContent(3)+bigContent(4))))
}

// runOwned runs a pod of ref for each range of ids, at the same time, and looks at
// the owners of files.
func (s *site) runOwned(t *testing.T, ref string, ranges ...uint32) {
	t.Helper()
	ctx := t.Context()
	for i, ids := range ranges {
		_, c := s.run(t, fmt.Sprint("users", i), ref, lab.PodOptions{HostIDs: ids})
		must(c.Exec(ctx, "/guest", "touch", "/new"))(t)
		got := must(c.Exec(ctx, "/guest", "stat", "/", "/guest", "/own", "/new"))(t)
		if want := "0:0 /\n0:0 /guest\n7:8 /own\n0:0 /new\n"; got != want {
			t.Errorf("with ids from %d on the container sees\n%swant\n%s", ids, got, want)
		}
		if m := must(c.Exec(ctx, "/guest", "cat", "/proc/self/uid_map"))(t); !strings.Contains(m, fmt.Sprint(ids)) {
			t.Fatalf("the pod has no user namespace: %s", m)
		}
	}
}
