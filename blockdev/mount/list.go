package mount

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
)

const fsErofs = "erofs"

// Info is one mount.
type Info struct {
	// Dir is the mount point.
	Dir string
	// Type is the file system's: "erofs", "fuse.shoal".
	Type string
	// Source is the file that holds the metadata of a block image, whichever way
	// it is mounted; "" if it cannot be found out. For other file systems it is
	// what mountinfo says.
	Source string
	// Major and Minor are the file system's device number. While one is mounted
	// or in use, no other has it.
	Major, Minor int
	// Kind is how a block image is mounted, 0 for other file systems.
	Kind Kind
}

// List returns the EROFS and FUSE mounts at dir and below it. Later ones come
// later, so the list read backwards is the order to unmount them in. A directory
// that is mounted over several times is there several times.
func List(dir string) ([]Info, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	// mountinfo's paths have no symbolic links. The directory itself may be a
	// dead mount, its parent is not.
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return nil, fmt.Errorf("mounts below %s: %w", dir, err)
	}
	root := filepath.Join(parent, filepath.Base(abs))
	if target, err := os.Readlink(root); err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join(parent, target)
		}
		if root, err = filepath.EvalSymlinks(target); err != nil {
			return nil, fmt.Errorf("mounts below %s: %w", dir, err)
		}
	}
	found, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		if m.Mountpoint != root && !strings.HasPrefix(m.Mountpoint, strings.TrimSuffix(root, "/")+"/") {
			return true, false
		}
		return m.FSType != fsErofs && m.FSType != "fuse" && !strings.HasPrefix(m.FSType, "fuse."), false
	})
	if err != nil {
		return nil, fmt.Errorf("mounts below %s: %w", dir, err)
	}
	infos := make([]Info, 0, len(found))
	for _, m := range found {
		i := Info{Dir: m.Mountpoint, Type: m.FSType, Source: m.Source, Major: m.Major, Minor: m.Minor}
		if m.FSType == fsErofs {
			i.Kind = File
			if loop, ok := strings.CutPrefix(m.Source, "/dev/loop"); ok {
				i.Kind, i.Source = Loop, loopBacking(loop)
			}
		}
		infos = append(infos, i)
	}
	return infos, nil
}

// loopBacking returns the file under /dev/loop<n>.
func loopBacking(n string) string {
	b, err := os.ReadFile("/sys/block/loop" + n + "/loop/backing_file")
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)")
}
