package boltcheck

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

// TestLiveStopsNobody: a check of a database in use lets others write to it, and is of
// one moment whatever they write.
func TestLiveStopsNobody(t *testing.T) {
	for name, o := range map[string]*bolt.Options{
		"list of free pages": {PageSize: 1024, NoSync: true, InitialMmapSize: 64 << 20},
		"no list":            {PageSize: 1024, NoSync: true, InitialMmapSize: 64 << 20, NoFreelistSync: true, FreelistType: bolt.FreelistMapType},
	} {
		t.Run(name, func(t *testing.T) {
			db, err := bolt.Open(filepath.Join(t.TempDir(), "db"), 0o600, o)
			if err != nil {
				t.Fatal(err)
			}
			write := func(n int) error {
				return db.Update(func(tx *bolt.Tx) error {
					b, err := tx.CreateBucketIfNotExists([]byte("a"))
					for i := range 40 {
						if err == nil {
							err = b.Put(fmt.Appendf(nil, "%d", (n*17+i*i)%3000), make([]byte, 20+n%100))
						}
					}
					if err == nil && n%3 == 0 {
						err = b.Delete(fmt.Appendf(nil, "%d", n%3000))
					}
					return err
				})
			}
			for n := range 200 {
				if err := write(n); err != nil {
					t.Fatal(err)
				}
			}
			err = Live(db, func(tx *bolt.Tx) error {
				keys := tx.Bucket([]byte("a")).Stats().KeyN
				for n := range 20 { // would wait for ever if the check kept writers out
					if err := write(1000 + n); err != nil {
						return err
					}
				}
				if after := tx.Bucket([]byte("a")).Stats().KeyN; after != keys {
					return fmt.Errorf("%d keys, and then %d", keys, after)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			var wg sync.WaitGroup
			stop := make(chan struct{})
			wg.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					if err := write(n); err != nil {
						t.Error(err)
						return
					}
				}
			})
			for range 100 {
				if err := Live(db, nil); err != nil {
					t.Error(err)
					break
				}
			}
			close(stop)
			wg.Wait()
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestUsedAndFree: a page that the list of free pages names, and that is in use, is
// damage: the next write goes over it.
func TestUsedAndFree(t *testing.T) {
	path := newDBWith(t, &bolt.Options{PageSize: 4096})
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	meta, err := readMeta(f)
	if err != nil {
		t.Fatal(err)
	}
	list := int64(order.Uint64(meta[32:])) * 4096
	var head [pageHeader]byte
	if _, err := f.ReadAt(head[:], list); err != nil {
		t.Fatal(err)
	}
	if n := order.Uint16(head[10:]); n == 0 || n == 0xffff {
		t.Fatalf("%d free pages", n)
	}
	root := make([]byte, 8)
	order.PutUint64(root, order.Uint64(meta[16:]))
	if _, err := f.WriteAt(root, list+pageHeader); err != nil {
		t.Fatal(err)
	}
	if err := Pages(path); !errors.Is(err, blockdev.ErrCorrupt) || !strings.Contains(err.Error(), "in use, and the list of free pages has it") {
		t.Errorf("at rest: %v", err)
	}
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := Live(db, nil); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("in use: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}
