package snapshotter

import (
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// dirs are the directories of snapshots.
type dirs struct {
	root string
	log  *slog.Logger
}

func (d dirs) dir(id string) string    { return filepath.Join(d.root, "s", id) }
func (d dirs) upper(id string) string  { return filepath.Join(d.dir(id), "fs") }
func (d dirs) work(id string) string   { return filepath.Join(d.dir(id), "work") }
func (d dirs) clones(id string) string { return filepath.Join(d.dir(id), "i") }
func (d dirs) links(id string) string  { return filepath.Join(d.root, "l", id) }
func (d dirs) scratch() string         { return filepath.Join(d.root, "scratch") }

// discard moves a directory, with what is mounted in it, to a new name in scratch.
func (d dirs) discard(dir string) (string, error) {
	tmp, err := os.MkdirTemp(d.scratch(), "gone-")
	if err != nil {
		return "", err
	}
	return tmp, unix.Rename(dir, tmp) // onto the empty directory, which os.Rename refuses
}

// removeDir removes a directory in scratch. A failure is logged: the next start tries
// again.
func (d dirs) removeDir(dir string) {
	// What is mounted inside must not be descended into.
	err := unmountClones(filepath.Join(dir, "i"))
	if err == nil {
		err = os.RemoveAll(dir)
	}
	if err != nil {
		d.log.Warn("cannot remove the directory of a removed snapshot", "path", dir, "error", err)
	}
}

// claim has the directory of a snapshot made, within the transaction that gives
// out its id. If that fails after, the directory stays and is somebody else's to
// claim: the id is given out again.
func (d dirs) claim(id string, fill func(dir string) error) error {
	dir := d.dir(id)
	if _, err := os.Lstat(dir); err == nil {
		gone, err := d.discard(dir)
		if err != nil {
			return err
		}
		d.removeDir(gone)
	}
	if err := fill(dir); err != nil {
		d.removeDir(dir)
		return err
	}
	return nil
}
