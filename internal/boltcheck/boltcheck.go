// Package boltcheck finds damage in bbolt databases before it does harm.
//
// bbolt has no checksums of its pages and reads them through a memory map: damage
// shows as a panic, as a memory fault that ends the process, or, in a page that is
// wrongly called free, as other data written over. A database that is checked as it is
// opened can be set aside instead.
//
// # Invariants
//
//   - No damage makes a function here panic, or the process end.
//   - An error wraps blockdev.ErrCorrupt only for damage, so that nothing is set
//     aside because a disk was full or a file was locked.
package boltcheck

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/shoalfs/shoal/blockdev"
)

// ErrInUse: another process has the database open.
var ErrInUse = errors.New("another process uses it")

// lockWait is how long a lock is waited for.
const lockWait = time.Second

// lockLook is how often it is tried.
const lockLook = 20 * time.Millisecond

// File checks the database at path, which no process has open for writing. visit, if
// not nil, looks at what it holds; an error of it counts as damage. A file that is
// not there is fs.ErrNotExist.
func File(path string, visit func(tx *bolt.Tx) error) error {
	if st, err := os.Stat(path); err != nil {
		return err
	} else if st.Size() == 0 {
		return nil // as a crash may leave a new one: bbolt sets it up
	}
	err := guard(func() error {
		if err := lockedPages(path); err != nil {
			return err
		}
		db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: lockWait, PreLoadFreelist: true})
		if err != nil {
			return err
		}
		// A view holds no lock that Close waits for once it has panicked.
		err = db.View(func(tx *bolt.Tx) error { return check(tx, visit) })
		return errors.Join(err, db.Close())
	})
	var system syscall.Errno
	switch {
	case err == nil:
		return nil
	case errors.Is(err, bolterrors.ErrTimeout), errors.Is(err, ErrInUse):
		return fmt.Errorf("%s: %w", path, ErrInUse)
	case errors.Is(err, blockdev.ErrCorrupt), errors.As(err, &system):
		return fmt.Errorf("%s: %w", path, err)
	default: // bbolt's own, such as "invalid database"
		return fmt.Errorf("%s: %w: %w", path, blockdev.ErrCorrupt, err)
	}
}

// Pages checks the pages of the database at path alone, at the cost of reading it once.
// That is for before it is opened: bbolt follows pages as it opens a database that
// keeps no free list, and what it finds there, in a goroutine of its own, ends the
// process. Errors are those of File.
func Pages(path string) error {
	if err := lockedPages(path); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// liveTries is how often Live looks for its transaction's meta page, which two commits
// at that very moment write over.
const liveTries = 10

// Live checks a database that is in use, as it is now. Others read and write during the check:
// a transaction that only reads keeps the pages that it sees from being used again,
// and they are read once. A writer waits only if the file outgrows its memory map.
func Live(db *bolt.DB, visit func(tx *bolt.Tx) error) error {
	f, err := os.Open(db.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	for range liveTries {
		found, err := liveOnce(db, f, visit)
		if found || err != nil {
			return err
		}
	}
	return fmt.Errorf("other programs write to %s all the time: check the file again later", db.Path())
}

func liveOnce(db *bolt.DB, f *os.File, visit func(tx *bolt.Tx) error) (found bool, err error) {
	tx, err := db.Begin(false)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, tx.Rollback()) }()
	meta := metaOf(f, uint64(tx.ID()), int64(db.Info().PageSize))
	if meta == nil {
		return false, nil
	}
	st, err := f.Stat()
	if err != nil {
		return true, err
	}
	if err := checkMeta(f, st.Size(), meta); err != nil || visit == nil {
		return true, err
	}
	if err := guard(func() error { return visit(tx) }); err != nil {
		return true, fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	return true, nil
}

// check checks the database of a transaction that no other one writes beside.
func check(tx *bolt.Tx, visit func(tx *bolt.Tx) error) error {
	// What can be walked through here does not fault in bbolt's own goroutine.
	err := guard(func() error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return walk(b) })
	})
	if err != nil {
		return err
	}
	var first error
	more := 0
	for err := range tx.Check() {
		if first == nil {
			first = err
		} else {
			more++
		}
	}
	if first != nil {
		return fmt.Errorf("%w: %w (and %d more)", blockdev.ErrCorrupt, first, more)
	}
	if visit == nil {
		return nil
	}
	if err := guard(func() error { return visit(tx) }); err != nil {
		return fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	return nil
}

func walk(b *bolt.Bucket) error {
	var sum byte
	return b.ForEach(func(k, v []byte) error {
		if v == nil {
			if sub := b.Bucket(k); sub != nil {
				return walk(sub)
			}
		}
		for _, s := range [][]byte{k, v} {
			if len(s) > 0 {
				sum ^= s[0] ^ s[len(s)-1] // touches the pages
			}
		}
		return nil
	})
}

// guard makes an error of a panic and of a memory fault.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", blockdev.ErrCorrupt, r)
		}
	}()
	return f()
}

// SetAside renames a damaged database, so that a new one takes its place, and
// returns the new name. An earlier one that was set aside is replaced.
func SetAside(path string) (string, error) {
	aside := path + ".damaged"
	if err := os.Rename(path, aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return aside, nil
}
