package host

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/shoalfs/shoal/internal/durable"
)

// program is a new program, on the file system that it is to be on.
type program struct {
	path   string // a file with another name
	target string
	sum    [sha256.Size]byte
}

// stage copies a program into a directory of the machine, beside the one that is there.
func stage(from, dir string) (_ *program, err error) {
	in, err := os.Open(from)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // of programs
		return nil, readOnly(err)
	}
	p := &program{path: filepath.Join(dir, ".shoal-new"), target: filepath.Join(dir, "shoal")}
	f, err := os.OpenFile(p.path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755) //nolint:gosec // a program
	if err != nil {
		return nil, readOnly(err)
	}
	sum := sha256.New()
	_, err = io.Copy(io.MultiWriter(f, sum), in)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, errors.Join(fmt.Errorf("copy the program: %w", err), os.Remove(p.path))
	}
	copy(p.sum[:], sum.Sum(nil))
	return p, nil
}

// drop removes what was not put in place.
func (p *program) drop() { _ = os.Remove(p.path) }

// isRunBy says whether a process runs this very program.
func (p *program) isRunBy(pid int) bool {
	sum, err := sumOf(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && sum == p.sum
}

func sumOf(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	copy(sum[:], h.Sum(nil))
	return sum, err
}

// readOnly says what to do on a machine whose directory of programs cannot be written to.
func readOnly(err error) error {
	if errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("%w: set node.binDir of the values to a directory that can be written to, such as /opt/shoal/bin", err)
	}
	return err
}

// file is one that the machine is to have.
type file struct {
	path string
	text []byte
	mode fs.FileMode
}

func (m *Machine) files(d Desired, set settings) []file {
	files := []file{
		{m.etc("token"), []byte(strings.TrimSpace(d.Token) + "\n"), 0o600},
		{m.etc("node.toml"), []byte(header + d.Config), 0o644},
	}
	if systemd() {
		files = append(files, file{unitPath, []byte(nodeUnit(d.BinDir, set.Root)), 0o644})
	}
	return files
}

// change is what a file was before.
type change struct {
	copy string // another name of the earlier file; empty: there was none
}

// changes are those that were made, by path.
type changes map[string]*change

// replace puts files and program in place, as far as they differ from what is there.
func (m *Machine) replace(files []file, p *program) (changes, error) {
	changed := changes{}
	for _, f := range files {
		old, err := os.ReadFile(f.path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return changed, err
		}
		if err == nil && bytes.Equal(old, f.text) {
			changed.unproven(f.path)
			continue
		}
		if err := os.MkdirAll(filepath.Dir(f.path), 0o755); err != nil { //nolint:gosec // as packages make it
			return changed, err
		}
		c, err := before(f.path)
		if err != nil {
			return changed, err
		}
		changed[f.path] = c
		if err := writeFile(f.path, f.text, f.mode); err != nil {
			return changed, err
		}
		m.Log.Info("wrote", "path", f.path)
	}
	if sum, err := sumOf(p.target); err == nil && sum == p.sum {
		changed.unproven(p.target)
		return changed, nil
	}
	c, err := before(p.target)
	if err != nil {
		return changed, err
	}
	changed[p.target] = c
	if err := os.Rename(p.path, p.target); err != nil {
		return changed, err
	}
	m.Log.Info("wrote", "path", p.target)
	return changed, durable.SyncDir(filepath.Dir(p.target))
}

// earlier is the name of the file that was at a path, until the new one has proved itself.
func earlier(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"-before")
}

// unproven adds a file that an installation put in place which ended before the node had got
// up with it: the earlier file is still there.
func (c changes) unproven(path string) {
	if _, err := os.Lstat(earlier(path)); err == nil {
		c[path] = &change{copy: earlier(path)}
	}
}

// before keeps the file at a path under another name, with its mode, owner and label. If the
// file is unproven, then the one before it stays.
func before(path string) (*change, error) {
	c := &change{copy: earlier(path)}
	if _, err := os.Lstat(c.copy); err == nil {
		return c, nil
	}
	err := link(path, c.copy)
	if errors.Is(err, fs.ErrNotExist) {
		return &change{}, nil
	}
	return c, err
}

// link gives a file another name, in place of what has that name. A symbolic link is a
// file of its own.
func link(path, name string) error {
	if _, err := os.Lstat(path); err != nil {
		return err
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Link(path, name)
}

// undo gives all paths the files that they had before.
func (c changes) undo() error {
	var errs []error
	for path, f := range c {
		var err error
		if f.copy != "" {
			err = f.back(path)
		} else if err = os.Remove(path); errors.Is(err, fs.ErrNotExist) {
			err = nil // it could not be written
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("take back the change of %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

// back puts the earlier file in place again. A rename does nothing if both names are of
// one file, so the other name is removed as well.
func (c *change) back(path string) error {
	if err := os.Rename(c.copy, path); err != nil {
		return err
	}
	if err := os.Remove(c.copy); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// forget removes what only undo needs.
func (c changes) forget() {
	for _, f := range c {
		if f.copy != "" {
			_ = os.Remove(f.copy)
		}
	}
}

func writeFile(path string, text []byte, mode fs.FileMode) error {
	return durable.Replace(path, text, mode)
}
