package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// InspectMounts looks at what is mounted below root, and at loop devices over its
// files, while no Manager has root open. It returns how many mounts there are. With repair, what
// belongs to no diff is taken away.
func InspectMounts(root string, repair bool) (mounts int, found []blockdev.Finding, err error) {
	found, mounts, err = inspectMounts(root, repair, func(i mount.Info) bool {
		_, err := os.Lstat(i.Source)
		return err == nil && strings.HasPrefix(i.Source, filepath.Join(root, "diffs")+"/")
	})
	return mounts, found, err
}

// inspectMounts asks known of each block image.
func inspectMounts(root string, repair bool, known func(mount.Info) bool) (found []blockdev.Finding, mounts int, err error) {
	list, err := mount.List(filepath.Join(root, mountsDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	used := make(map[string]bool) // directories of diffs
	for _, i := range list {
		mounts++
		used[filepath.Dir(i.Source)] = true
		if i.Kind == 0 || known(i) {
			continue
		}
		f := blockdev.Finding{Where: "mount " + i.Dir, Problem: fmt.Sprintf("shows %s, which is not a layer of this node", i.Source)}
		if repair {
			if err := mount.Detach(i.Dir); err != nil {
				return nil, 0, err
			}
			f.Repaired = "unmounted"
		}
		found = append(found, f)
	}
	loops, err := inspectLoops(root, repair, used)
	return append(found, loops...), mounts, err
}

// inspectLoops finds loop devices over files below root/diffs whose directory is not one of
// mounted. They go by themselves with their mount, unless something went wrong.
func inspectLoops(root string, repair bool, mounted map[string]bool) (found []blockdev.Finding, err error) {
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, b := range backing {
		text, err := os.ReadFile(b)
		if err != nil {
			continue // gone since
		}
		file := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), " (deleted)")
		if !strings.HasPrefix(file, filepath.Join(root, "diffs")+"/") || mounted[filepath.Dir(file)] {
			continue
		}
		dev := "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(b)))
		f := blockdev.Finding{Where: dev, Problem: fmt.Sprintf("is a loop device over %s, and nothing is mounted from it", file)}
		if repair {
			if err := clearLoop(dev); err != nil {
				return nil, fmt.Errorf("%s: %w", dev, err)
			}
			f.Repaired = "detached"
		}
		found = append(found, f)
	}
	return found, nil
}

func clearLoop(dev string) error {
	f, err := os.Open(dev)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
}

// Verify checks every diff and mount while they are in use: it waits for demand
// reads, and disturbs no reader. Damaged chunks are fetched again in any case; with
// repair, Verify waits for that, other files are written again where that can be
// done, and mounts of no diff are taken away. progress, which may be nil, is
// called with each diff before it is read.
func (m *Manager) Verify(ctx context.Context, repair bool, progress func(id blockdev.Digest)) (*cache.Inspection, int, error) {
	sum := &cache.Inspection{}
	for _, v := range m.volumes() {
		if progress != nil {
			progress(v.id)
		}
		in, err := v.diff.Verify(ctx, repair)
		if errors.Is(err, cache.ErrRemoved) {
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		if len(in.Findings) > 0 {
			m.queues.refetchAndWait(ctx, v, in, repair)
		}
		sum.Diffs += in.Diffs
		sum.Complete += in.Complete
		sum.Proven += in.Proven
		sum.Chunks += in.Chunks
		sum.Bytes += in.Bytes
		sum.Findings = append(sum.Findings, in.Findings...)
	}
	found, mounts, err := inspectMounts(m.root, repair, m.owns)
	if err != nil {
		return nil, 0, err
	}
	sum.Findings = append(sum.Findings, found...)
	return sum, mounts, ctx.Err()
}

// owns says whether a mount is that of a volume, or of a diff that cannot be opened yet. One
// that was just being taken away is not there any more at the second look.
func (m *Manager) owns(i mount.Info) bool {
	// In this order: a diff that is opened in between has a volume then.
	if m.leftAt(i.Dir) || m.source(i) != nil {
		return true
	}
	now, err := mount.List(i.Dir)
	return err != nil || len(now) == 0 || now[len(now)-1].Source != i.Source
}

// leftAt says whether a diff that cannot be opened yet is mounted at dir.
func (m *Manager) leftAt(dir string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, left := range m.left {
		if left.dir == dir || slices.Contains(left.retired, dir) {
			return true
		}
	}
	return false
}
