package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// fixup makes dst, a tree of directories that goes on top of own, the block image
// of a layer, in overlayfs' list. implied are the directories that the layer has
// no entry for; each takes its attributes from the topmost of lowers (top first)
// that has it, as containerd's archive.Apply does. Directories above these, and
// the root, repeat own's attributes. needed is false, and dst is not made, if no
// lower directory has any of them. It looks at ctx as it goes: a hostile index may
// imply a million directories.
//
// dst holds no opaque marks: own's count, since overlayfs goes on from dst to own.
func fixup(ctx context.Context, dst string, implied []string, own string, lowers []string) (needed bool, err error) {
	from := make(map[string]string) // clean relative path -> directory with its attributes
	for _, dir := range implied {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		src, err := attributes(dir, lowers)
		if err != nil {
			return false, err
		}
		if src != "" {
			from[dir] = src
		}
	}
	if len(from) == 0 {
		return false, nil
	}
	dirs := []string{""} // dst itself
	for dir := range from {
		for p := dir; p != "."; p = path.Dir(p) {
			dirs = append(dirs, p)
		}
	}
	slices.Sort(dirs) // what is in a directory comes after it
	dirs = slices.Compact(dirs)
	for _, dir := range dirs {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		if err := os.Mkdir(filepath.Join(dst, dir), 0o700); err != nil {
			return false, err
		}
	}
	// Backwards, since making a child changes its parent's time.
	for _, dir := range slices.Backward(dirs) {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		src, err := inside(own, dir)
		if err != nil {
			return false, err
		}
		lower, below := from[dir]
		if below {
			src = lower
		}
		if err := copyAttributes(filepath.Join(dst, dir), src, below); err != nil {
			return false, fmt.Errorf("fix-up of directory %q: %w", dir, err)
		}
	}
	return true, nil
}

// attributes finds the directory that dir's attributes come from; empty: the
// layers below do not have it, or the topmost that has the name has no directory.
func attributes(dir string, lowers []string) (string, error) {
	for _, lower := range lowers {
		p, err := fs.RootPath(lower, dir)
		if errors.Is(err, syscall.ENOTDIR) {
			return "", nil
		} else if err != nil {
			return "", fmt.Errorf("directory %q in %s: %w", dir, lower, err)
		}
		fi, err := os.Lstat(p)
		switch {
		case errors.Is(err, os.ErrNotExist):
			continue
		case errors.Is(err, syscall.ENOTDIR), err == nil && !fi.IsDir():
			return "", nil
		case err != nil:
			return "", err
		}
		return p, nil
	}
	return "", nil
}

// inside is a directory of a block image. An index that implies one which is not
// there is wrong.
func inside(own, dir string) (string, error) {
	p, err := fs.RootPath(own, dir)
	if err != nil {
		return "", err
	}
	fi, err := os.Lstat(p)
	if err != nil || !fi.IsDir() || p != filepath.Join(own, dir) {
		return "", fmt.Errorf("index implies a directory in %q, which is not a directory in the layer: %w", dir, blockdev.ErrCorrupt)
	}
	return p, nil
}

// copyAttributes gives dst the mode, owner, times and extended attributes of src.
// Of a directory from a layer below, trusted ones stay behind, as in containerd;
// overlayfs' own do in any case.
func copyAttributes(dst, src string, below bool) error {
	var st unix.Stat_t
	if err := unix.Lstat(src, &st); err != nil {
		return err
	}
	if err := os.Lchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(dst, st.Mode&^unix.S_IFMT); err != nil {
		return err
	}
	names, err := xattrs(src)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, "trusted.overlay.") || below && strings.HasPrefix(name, "trusted.") {
			continue
		}
		value := make([]byte, 64<<10) // the kernel's limit for one value
		n, err := unix.Lgetxattr(src, name, value)
		if errors.Is(err, unix.ENODATA) {
			continue
		} else if err != nil {
			return fmt.Errorf("xattr %s: %w", name, err)
		}
		if err := unix.Lsetxattr(dst, name, value[:n], 0); err != nil {
			return fmt.Errorf("xattr %s: %w", name, err)
		}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dst, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

func xattrs(p string) ([]string, error) {
	list := make([]byte, 64<<10) // the kernel's limit for all names
	n, err := unix.Llistxattr(p, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var names []string
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		if name != "" {
			names = append(names, name)
		}
	}
	return names, nil
}
