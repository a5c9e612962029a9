package boltcheck

import (
	"bytes"
	"errors"
	"os"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

// TestSeal: a database is sealed from its orderly end to the next transaction, and
// whatever its free pages were they are that after it.
func TestSeal(t *testing.T) {
	options := &bolt.Options{NoFreelistSync: true}
	path := newDBWith(t, options)
	sealed := func(want bool, when string) {
		t.Helper()
		if got, err := Sealed(path); err != nil || got != want {
			t.Errorf("%s: sealed is %v, %v", when, got, err)
		}
	}
	sealed(false, "closed without Seal")
	for round := range 3 {
		db, err := bolt.Open(path, 0o600, options)
		if err != nil {
			t.Fatal(err)
		}
		if round > 0 {
			if err := db.Update(func(tx *bolt.Tx) error {
				return tx.Bucket([]byte("a")).Put([]byte("key"), bytes.Repeat([]byte("v"), 100_000*(round%2)))
			}); err != nil {
				t.Fatal(err)
			}
		}
		if err := Seal(db); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		sealed(true, "after Seal")
		if err := File(path, nil); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
	}
	db, err := bolt.Open(path, 0o600, options)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Sealed(path); !errors.Is(err, ErrInUse) {
		t.Errorf("in use: %v", err)
	}
	if err := db.Update(func(*bolt.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	sealed(false, "after another transaction")
}

// TestSealedTooShort: a file that has lost its end is not taken for whole.
func TestSealedTooShort(t *testing.T) {
	path := newDBWith(t, nil) // bbolt's own list of free pages: sealed
	if sealed, err := Sealed(path); err != nil || !sealed {
		t.Fatal(sealed, err)
	}
	if err := os.Truncate(path, 2*int64(os.Getpagesize())); err != nil {
		t.Fatal(err)
	}
	if _, err := Sealed(path); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("%v, want corrupt", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Sealed(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}
