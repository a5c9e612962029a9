package mount

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// User is a mount that is made of others: an overlayfs mount, or a bind mount or
// idmapped clone of a block image.
type User struct {
	// Dir is its mount point.
	Dir string
	// Lower are the directories that an overlayfs mount joins, as they were given, so
	// perhaps relative to a directory that is not known any more.
	Lower []string
	// Source is that of Info, of a block image.
	Source string
}

// Users returns the overlayfs and EROFS mounts of this process' mount namespace that
// are not below dir. Lower directories that were given by other names, as those of
// images with well over a hundred layers are, show these.
func Users(dir string) (users []User, err error) {
	_, err = mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		switch {
		case strings.HasPrefix(m.Mountpoint, strings.TrimSuffix(dir, "/")+"/"):
		case m.FSType == "overlay":
			if lower := lowerDirs(m.VFSOptions); len(lower) > 0 {
				users = append(users, User{Dir: m.Mountpoint, Lower: lower})
			}
		case m.FSType == fsErofs:
			source := m.Source
			if loop, ok := strings.CutPrefix(source, "/dev/loop"); ok {
				source = loopBacking(loop)
			}
			users = append(users, User{Dir: m.Mountpoint, Source: source})
		}
		return true, false
	})
	if err != nil {
		return nil, fmt.Errorf("mounts that use those below %s: %w", dir, err)
	}
	return users, nil
}

// lowerDirs finds the lower directories in overlayfs' mount options.
func lowerDirs(options string) (dirs []string) {
	for o := range strings.SplitSeq(options, ",") {
		if list, ok := strings.CutPrefix(o, "lowerdir="); ok {
			dirs = append(dirs, strings.Split(list, ":")...)
		} else if dir, ok := strings.CutPrefix(o, "lowerdir+="); ok {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// Uses says whether it is made of the image whose metadata lies where meta is, as mounted
// at one of dirs, now or before that was replaced.
func (u User) Uses(meta string, dirs ...string) bool {
	if u.Source != "" {
		return filepath.Dir(u.Source) == filepath.Dir(meta)
	}
	return slices.ContainsFunc(u.Lower, func(l string) bool {
		return slices.ContainsFunc(dirs, func(dir string) bool {
			// Names of mount points are as good as unique.
			return l == dir || !filepath.IsAbs(l) && filepath.Base(l) == filepath.Base(dir)
		})
	})
}

// Serial returns a number of the mount that is seen at dir. A mount that was made
// later has a larger one, as long as the machine runs. 0: the kernel does not say
// (before Linux 6.8), or there is nothing at dir.
func Serial(dir string) uint64 {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID_UNIQUE, &st)
	if err != nil || st.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		return 0
	}
	return st.Mnt_id
}
