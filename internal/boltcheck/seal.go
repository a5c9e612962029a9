package boltcheck

import (
	"fmt"
	"os"

	bolt "go.etcd.io/bbolt"
)

// Seal writes down that nothing is missing from a database that is opened with
// NoFreelistSync, as the last thing before it is closed: its list of free pages. The
// next transaction takes that back, so a reader that finds it knows that none has come after.
func Seal(db *bolt.DB) error {
	db.NoFreelistSync = false
	return guard(func() error { return db.Update(func(*bolt.Tx) error { return nil }) })
}

// Sealed says whether the last thing that was written to the database at path is Seal's.
// It reads the meta records and the list of free pages: the others are what they were
// when the database was closed, unless the disk has changed them. Errors are those of
// Pages.
func Sealed(path string) (sealed bool, err error) {
	err = locked(path, func(f *os.File) error {
		st, err := f.Stat()
		if err != nil || st.Size() == 0 {
			return err
		}
		meta, err := readMeta(f)
		if err != nil {
			return err
		}
		id := order.Uint64(meta[32:])
		if id == noFreelist {
			return nil
		}
		p := newPages(f, meta)
		if most := uint64(st.Size() / p.size); p.end > most {
			return corrupt("%d pages in a file that has room for %d", p.end, most)
		}
		if _, err := p.freelist(id); err != nil {
			return err
		}
		sealed = true
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return sealed, nil
}
