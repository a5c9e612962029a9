// Package durable writes small files that survive a power cut.
//
// A file that Replace or Create writes is there with all its bytes, or the path is as it
// was before: the bytes go to another file in the same directory, are synced, and get
// their name then. When a function returns nil, the name is on disk as well. A crash in
// between may leave the other file behind, which is named ".NAME-" and a number; Sweep
// removes such files.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Replace writes b to a file of this mode at path, in place of what is there.
// Processes that have the old file open or mounted keep it.
func Replace(path string, b []byte, mode fs.FileMode) error { return write(path, b, mode, os.Rename) }

// Create is Replace for a path where nothing is. If something is there already, then it
// stays, and the error wraps fs.ErrExist.
func Create(path string, b []byte, mode fs.FileMode) error { return write(path, b, mode, os.Link) }

func write(path string, b []byte, mode fs.FileMode, name func(from, to string) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // fails after a rename
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := name(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// Sweep removes what a crash has left behind in a directory, while nothing else writes
// there. No other file in the directory may have a name that begins with a dot.
func Sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// SyncDir makes the names in a directory durable: of files that were made, renamed or
// deleted there.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
