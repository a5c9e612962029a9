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

	"github.com/containerd/continuity"
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
	show := func(sign string, lines, others []byte) {
		for line := range bytes.Lines(lines) {
			if bytes.Contains(line, []byte(mark)) && !bytes.Contains(others, line) {
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

func (c Change) apply() error {
	if c.Old != nil && c.New != nil {
		if _, err := os.Lstat(c.Path + copySuffix); errors.Is(err, fs.ErrNotExist) {
			if err := (Change{Path: c.Path + copySuffix, New: c.Old}).write(); err != nil {
				return err
			}
		}
	}
	return c.write()
}

func (c Change) write() error {
	if c.New == nil {
		if err := os.Remove(c.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	mode := fs.FileMode(0o644)
	if st, err := os.Stat(c.Path); err == nil {
		mode = st.Mode().Perm()
	}
	if err := os.MkdirAll(filepath.Dir(c.Path), 0o755); err != nil {
		return err
	}
	return continuity.AtomicWriteFile(c.Path, c.New, mode)
}
