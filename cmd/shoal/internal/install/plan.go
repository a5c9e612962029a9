package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/continuity"
	"golang.org/x/sys/unix"
)

// Change is a file that is to be written, made or removed.
type Change struct {
	Path string
	// Old is what the file has; nil: there is no file.
	Old []byte
	// New is what it is to have; nil: the file goes.
	New []byte
}

// String says which lines of the file go and come.
func (c Change) String() string {
	var b strings.Builder
	switch {
	case c.Old == nil:
		fmt.Fprintf(&b, "new file %s\n", c.Path)
	case c.New == nil:
		fmt.Fprintf(&b, "file %s is removed\n", c.Path)
		return b.String()
	default:
		fmt.Fprintf(&b, "file %s\n", c.Path)
	}
	whole := bytes.HasPrefix(c.New, []byte(unitHeader)) // all of it is shoal's
	show := func(sign string, lines, others []byte) {
		for line := range bytes.Lines(lines) {
			if (whole || bytes.Contains(line, []byte(mark))) && !bytes.Contains(others, line) {
				fmt.Fprintf(&b, "  %s %s", sign, line)
			}
		}
	}
	show("-", c.Old, c.New)
	show("+", c.New, c.Old)
	return b.String()
}

// Plan is what has to be done.
type Plan struct {
	Changes []Change
	// Notes are sentences for the operator.
	Notes []string
}

// add adds a change, unless there is nothing to change.
func (p *Plan) add(path string, old, text []byte) {
	if !bytes.Equal(old, text) || (old == nil) != (text == nil) {
		p.Changes = append(p.Changes, Change{path, old, text})
	}
}

// Apply does what the plan says, and keeps a copy of each file that was there before. If
// it fails, then nothing has changed, as far as that is possible: the error says what is
// left.
func (p Plan) Apply() error {
	for i, c := range p.Changes {
		if err := c.apply(); err != nil {
			return errors.Join(err, Plan{Changes: p.Changes[:i]}.Undo())
		}
	}
	return nil
}

// Undo gives all files what they had before Apply.
func (p Plan) Undo() error {
	var errs []error
	for _, c := range slices.Backward(p.Changes) {
		if err := (Change{Path: c.Path, New: c.Old}).write(); err != nil {
			errs = append(errs, fmt.Errorf("take back the change of %s: %w", c.Path, err))
		}
	}
	return errors.Join(errs...)
}

// apply keeps a copy of a file that has nothing of shoal yet.
func (c Change) apply() error {
	if c.Old != nil && c.New != nil && !bytes.Contains(c.Old, []byte(mark)) {
		if err := (Change{Path: c.Path + copySuffix, New: c.Old}).writeLike(c.Path); err != nil {
			return err
		}
	}
	return c.write()
}

// write gives the file its new contents, and removes the copy of a file that is what it was
// again.
func (c Change) write() error {
	if err := c.writeLike(c.Path); err != nil {
		return err
	}
	if old, err := os.ReadFile(c.Path + copySuffix); err == nil && bytes.Equal(old, c.New) {
		return os.Remove(c.Path + copySuffix)
	}
	return nil
}

// selinux is the extended attribute that has the label of SELinux.
const selinux = "security.selinux"

// writeLike gives the file its new contents, with mode, owner and label of another one. A
// symbolic link to the file stays.
func (c Change) writeLike(other string) error {
	if c.New == nil {
		if err := os.Remove(c.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return readOnly(c.Path, err)
		}
		return nil
	}
	path, err := filepath.EvalSymlinks(c.Path)
	if errors.Is(err, fs.ErrNotExist) {
		path = c.Path
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s is a symbolic link to a file that is not there", path)
		}
	} else if err != nil {
		return err
	}
	mode, label := fs.FileMode(0o644), []byte(nil)
	st, statErr := os.Stat(other)
	if statErr == nil {
		mode, label = st.Mode().Perm(), make([]byte, 256)
		size, err := unix.Getxattr(other, selinux, label)
		label = label[:max(size, 0)]
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("label of %s: %w", other, err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return readOnly(path, err)
	}
	if err := continuity.AtomicWriteFile(path, c.New, mode); err != nil {
		return readOnly(path, err)
	}
	if statErr != nil {
		return nil
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		if err := os.Chown(path, int(sys.Uid), int(sys.Gid)); err != nil {
			return err
		}
	}
	if len(label) > 0 {
		if err := unix.Setxattr(path, selinux, label, 0); err != nil {
			return fmt.Errorf("label of %s: %w", path, err)
		}
	}
	return nil
}

// readOnly says what to do about a file system that cannot be written to.
func readOnly(path string, err error) error {
	if !errors.Is(err, unix.EROFS) {
		return err
	}
	return fmt.Errorf("%w: add the lines of docs/containerd.md to what %s is made from", err, path)
}
