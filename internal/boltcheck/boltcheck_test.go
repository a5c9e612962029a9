package boltcheck

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

func newDB(t *testing.T) string { return newDBWith(t, nil) }

func newDBWith(t *testing.T, o *bolt.Options) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "db")
	db, err := bolt.Open(path, 0o600, o)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		err := db.Update(func(tx *bolt.Tx) error {
			for _, name := range []string{"a", "b"} {
				b, err := tx.CreateBucketIfNotExists([]byte(name))
				if err != nil {
					return err
				}
				if b, err = b.CreateBucketIfNotExists([]byte("inner")); err != nil {
					return err
				}
				for i := range 300 {
					if err := b.Put(fmt.Appendf(nil, "key %d", i), bytes.Repeat([]byte{byte(i)}, 50+round*i)); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFile(t *testing.T) {
	path := newDB(t)
	if err := File(path, nil); err != nil {
		t.Errorf("a sound database: %v", err)
	}
	bad := errors.New("what is this")
	if err := File(path, func(*bolt.Tx) error { return bad }); !errors.Is(err, bad) || !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("damage that the visitor finds: %v", err)
	}
	if err := File(path+"x", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(path+"0", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := File(path+"0", nil); err != nil {
		t.Errorf("an empty file: %v", err)
	}
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := File(path, nil); !errors.Is(err, ErrInUse) || errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("in use: %v", err)
	}
	if err := Live(db, nil); err != nil {
		t.Errorf("by who has it open: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	aside, err := SetAside(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(aside); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	if _, err := SetAside(path); err != nil {
		t.Errorf("nothing to set aside: %v", err)
	}
}

// TestPages: what bbolt itself writes is never called damaged, whatever it has been
// through, and a branch that does not begin where its leaf does always is: with the next
// write bbolt would make two of it.
func TestPages(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	if err := Pages(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 40 {
		db, err := bolt.Open(path, 0o600, &bolt.Options{NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte("a"))
			for range 300 {
				key := fmt.Appendf(nil, "%032d", rng.IntN(2000))
				if err == nil && rng.IntN(40) < 20+round/4 {
					err = b.Delete(key)
				} else if err == nil {
					err = b.Put(key, make([]byte, rng.IntN(300)))
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := Live(db, nil); err != nil {
			t.Fatalf("round %d, live: %v", round, err)
		}
		if round == 0 { // it waits for a second
			if err := Pages(path); !errors.Is(err, ErrInUse) {
				t.Errorf("in use: %v", err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if err := Pages(path); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for at := 0; at < len(data); at += os.Getpagesize() {
		page := data[at:min(at+os.Getpagesize(), len(data))]
		if order.Uint16(page[8:]) != branchPage || order.Uint64(page) != uint64(at/os.Getpagesize()) {
			continue
		}
		page[pageHeader+order.Uint32(page[pageHeader:])+31] ^= 1 // the last byte of its first key
		err := checkReader(bytes.NewReader(data), int64(len(data)))
		page[pageHeader+order.Uint32(page[pageHeader:])+31] ^= 1
		if err != nil {
			found++
		}
	}
	if found == 0 {
		t.Error("no branch was found to begin elsewhere")
	}
}

// TestDamage: no damage takes the process down, and what is not found does not
// change what is read but for the flipped bits themselves.
func TestDamage(t *testing.T) {
	t.Run("with a free list", func(t *testing.T) { testDamage(t, newDB(t)) })
	// Such a one is followed through all its pages as it is opened.
	t.Run("without", func(t *testing.T) { testDamage(t, newDBWith(t, &bolt.Options{NoFreelistSync: true})) })
}

func testDamage(t *testing.T, path string) {
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	found := 0
	for round := range 400 {
		b := bytes.Clone(good)
		switch round % 4 {
		case 0: // a page of garbage
			page := rng.IntN(len(b) / 4096)
			for i := range 4096 {
				b[page*4096+i] = byte(rng.Uint32())
			}
		case 1: // a flipped bit in a page's header or its first elements
			page := rng.IntN(len(b) / 4096)
			b[page*4096+rng.IntN(64)] ^= 1 << rng.IntN(8)
		case 2: // cut short
			b = b[:rng.IntN(len(b))]
		case 3: // a high bit of a word anywhere: a length, a position, a page
			b[rng.IntN(len(b)/4)*4+3] ^= 1 << rng.IntN(8)
		}
		// A new file: where bbolt has given up, it may go on reading the old one.
		path := fmt.Sprintf("%s-%d", path, round)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := File(path, nil); errors.Is(err, blockdev.ErrCorrupt) {
			found++
		} else if err != nil {
			t.Errorf("round %d: %v", round, err)
		}
	}
	// Most pages of a small database are free, and what is in them is nothing.
	if found < 75 {
		t.Errorf("%d of 400 databases were found damaged", found)
	}
}

// FuzzPages: whatever is in the file, it is checked and not followed out of it.
func FuzzPages(f *testing.F) {
	path := filepath.Join(f.TempDir(), "db")
	for _, o := range []*bolt.Options{{PageSize: 1024}, {PageSize: 1024, NoFreelistSync: true}} {
		db, err := bolt.Open(path, 0o600, o)
		if err != nil {
			f.Fatal(err)
		}
		err = db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucket([]byte("b"))
			for i := 0; i < 40 && err == nil; i++ {
				err = b.Put(fmt.Appendf(nil, "key %d", i), make([]byte, 30))
			}
			return err
		})
		if err := errors.Join(err, db.Close()); err != nil {
			f.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		if err := checkReader(bytes.NewReader(b), int64(len(b))); err != nil {
			f.Errorf("a sound database: %v", err)
		}
		f.Add(b)
		if err := os.Remove(path); err != nil {
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := checkReader(bytes.NewReader(b), int64(len(b))); err != nil && !errors.Is(err, blockdev.ErrCorrupt) {
			t.Error(err)
		}
	})
}
