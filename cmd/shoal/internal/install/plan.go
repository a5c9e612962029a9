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

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/internal/durable"
)

// Change is a file that is to be written, made or removed.
type Change struct {
	Path string
	// Old is what the file has; nil: there is no file.
	Old []byte
	// New is what it is to have; nil: the file goes.
	New []byte
	// had is what Apply found; nil: no file.
	had *attributes
}

// attributes of a file, beside its contents.
type attributes struct {
	mode     fs.FileMode
	uid, gid int
	label    []byte // of SELinux; empty: none
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
	whole := bytes.HasPrefix(c.New, []byte(wholeHeader)) // all of it is shoal's
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

	seen     map[string][]byte // what files that were looked at are to have
	recorded []string          // the files of Host.Record
}

// add adds a change, unless there is nothing to change. It is one of the file that a symbolic
// link leads to.
func (p *Plan) add(path string, old, text []byte) {
	path = target(path)
	if p.seen == nil {
		p.seen = map[string][]byte{}
	}
	p.seen[path] = text
	if !same(old, text) {
		p.Changes = append(p.Changes, Change{Path: path, Old: old, New: text})
	}
}

// Apply does what the plan says, and keeps a copy of each file that was there before. If
// it fails, then nothing has changed, as far as that is possible: the error says what is
// left.
func (p Plan) Apply() error {
	for i := range p.Changes {
		if err := p.Changes[i].apply(); err != nil {
			return errors.Join(err, Plan{Changes: p.Changes[:i]}.Undo())
		}
	}
	return nil
}

// Undo gives all files what they had before Apply, mode, owner and label too.
func (p Plan) Undo() error {
	var errs []error
	for _, c := range slices.Backward(p.Changes) {
		errs = append(errs, c.undo())
	}
	return errors.Join(errs...)
}

func (c Change) undo() error {
	if err := (Change{Path: c.Path, New: c.Old, had: c.had}).write(); err != nil {
		return fmt.Errorf("take back the change of %s: %w", c.Path, err)
	}
	return nil
}

// apply keeps a copy of a file that has nothing of shoal yet.
func (c *Change) apply() (err error) {
	if c.had, err = attributesOf(c.Path); err != nil {
		return err
	}
	if c.Old != nil && c.New != nil && !bytes.Contains(c.Old, []byte(mark)) {
		if err := (Change{Path: c.Path + copySuffix, New: c.Old, had: c.had}).replace(); err != nil {
			return err
		}
	}
	if err := c.write(); err != nil {
		return errors.Join(err, c.undo())
	}
	return nil
}

// write gives the file its new contents, and removes the copy of a file that is what it was
// again.
func (c Change) write() error {
	now, err := readFile(c.Path)
	if err != nil {
		return err
	}
	if !same(now, c.New) { // the same: it could not be changed, and this is undo
		if err := c.replace(); err != nil {
			return err
		}
	}
	if old, err := os.ReadFile(c.Path + copySuffix); err == nil && bytes.Equal(old, c.New) {
		return os.Remove(c.Path + copySuffix)
	}
	return nil
}

// same says whether two files are the same; nil is one that is not there.
func same(a, b []byte) bool { return bytes.Equal(a, b) && (a == nil) == (b == nil) }

// linked says that the path is a symbolic link.
func linked(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode()&fs.ModeSymlink != 0
}

// target is the file that a symbolic link leads to, or the path itself.
func target(path string) string {
	if !linked(path) {
		return path
	}
	file, err := filepath.EvalSymlinks(path)
	if err != nil {
		return path // replace says so
	}
	return file
}

// selinux is the extended attribute that has the label of SELinux.
const selinux = "security.selinux"

// attributesOf returns nil if there is no file.
func attributesOf(path string) (*attributes, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	a := &attributes{mode: st.Mode().Perm(), uid: -1, gid: -1, label: make([]byte, 256)}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		a.uid, a.gid = int(sys.Uid), int(sys.Gid)
	}
	size, err := unix.Getxattr(path, selinux, a.label)
	a.label = a.label[:max(size, 0)]
	if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
		return nil, fmt.Errorf("label of %s: %w", path, err)
	}
	return a, nil
}

// replace gives the file its new contents, with the attributes in had.
func (c Change) replace() error {
	path := c.Path
	if c.New == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return readOnly(path, err)
		}
		if dir := filepath.Dir(path); filepath.Base(dir) == forAll {
			_ = os.Remove(dir) // an empty one would hide other directories from containerd
		}
		return nil
	}
	if linked(path) {
		return fmt.Errorf("%s is a symbolic link to a file that does not exist: make the file, or remove the link", path)
	}
	mode := fs.FileMode(0o644)
	if c.had != nil {
		mode = c.had.mode
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return readOnly(path, err)
	}
	if err := durable.Replace(path, c.New, mode); err != nil {
		return readOnly(path, err)
	}
	if c.had == nil {
		return nil
	}
	if err := os.Chown(path, c.had.uid, c.had.gid); err != nil {
		return err
	}
	if len(c.had.label) > 0 {
		if err := unix.Setxattr(path, selinux, c.had.label, 0); err != nil {
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
	return fmt.Errorf("%w: add the lines of docs/containerd.md to what %s is made from", err, strings.TrimSuffix(path, copySuffix))
}
