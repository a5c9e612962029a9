package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
)

// TestUncleanEndIsRemembered: the first process after a power loss ends, in one way
// or the other, before it has opened the diffs. The next one still does not believe
// what the power loss may have spoiled.
func TestUncleanEndIsRemembered(t *testing.T) {
	for name, end := range map[string]func(r *rig){
		"killed": func(r *rig) { r.crash(nil) },
		"closed": func(r *rig) { r.close(); r.open() },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 1<<20, nil)
			r.checkRead(0, 300_000)
			r.quiet()
			if err := r.d.sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			off := r.d.tab.Start(0)
			decode := r.cfg.decode
			r.crash(func() {
				flipFile(t, r.d.DataPath(), off+10)
				r.cfg.bootID = "second boot"
				r.cfg.decode = func([]byte) (*blockdev.Index, error) { return nil, unix.EMFILE }
			})
			if len(r.Diffs()) != 0 || !r.unclean {
				t.Fatalf("%d diffs were opened, unclean %v", len(r.Diffs()), r.unclean)
			}
			r.cfg.decode = decode
			end(r)
			r.expect()
			r.checkRead(off, 1000)
			// Once all has been looked at, it is forgotten.
			r.crash(nil)
			if r.unclean {
				t.Error("an unclean end is remembered for ever")
			}
			r.expect()
		})
	}
}

// TestOpenedLater: what cannot be opened for a reason that passes is, without a
// restart, and nothing of it is fetched again.
func TestOpenedLater(t *testing.T) {
	var ill atomic.Bool
	r := newRig(t, 1<<20, func(c *Config) {
		c.decode = func(b []byte) (*blockdev.Index, error) {
			if ill.Load() {
				return nil, unix.EIO
			}
			return index.Decode(b)
		}
	})
	r.prefetch()
	fetched := r.Stats().PrefetchBytes + r.Stats().DemandBytes
	if fetched == 0 {
		t.Fatal("nothing was fetched")
	}
	r.close()
	ill.Store(true)
	r.open()
	if _, ok := r.Get(r.ix.DiffID); ok || !slices.Contains(r.Known(), r.ix.DiffID) {
		t.Errorf("open %v, known %v", ok, r.Known())
	}
	ill.Store(false)
	r.eventually("the diff is open", func() bool {
		d, ok := r.Get(r.ix.DiffID)
		r.d = d
		return ok
	})
	r.checkRead(0, 1<<20)
	if s := r.Stats(); s.PrefetchBytes+s.DemandBytes != 0 || !r.d.Complete() {
		t.Errorf("fetched again: %+v", s)
	}
	// Nobody needs it any more, and it cannot be opened: it goes all the same.
	r.close()
	ill.Store(true)
	r.open()
	if err := r.Remove(t.Context(), r.ix.DiffID); err != nil || len(r.Known()) != 0 {
		t.Errorf("remove: %v, known %v", err, r.Known())
	}
	if left, err := os.ReadDir(filepath.Join(r.cfg.Root, diffsDir)); err != nil || len(left) != 0 {
		t.Errorf("left on disk: %v, %v", left, err)
	}
	ill.Store(false)
}

// TestDamagedIsTold: whoever finds damage, the one who can mend it hears of it, and
// no scrub calls the diff well before it is complete again.
func TestDamagedIsTold(t *testing.T) {
	for name, find := range map[string]func(r *rig, d blockdev.Digest){
		"another machine reads": func(r *rig, d blockdev.Digest) {
			r.source(func(context.Context, blockdev.Request, blockdev.Deliver) error { return blockdev.ErrUnavailable })
			if _, err := r.forward(blockdev.Prefetch, 0, d).Chunk(r.t.Context(), 0, alloc); !errors.Is(err, blockdev.ErrUnavailable) {
				r.t.Errorf("a damaged chunk was given away: %v", err)
			}
			r.source(r.mem.Fetch)
		},
		"another image copies": func(r *rig, d blockdev.Digest) {
			// Another layer with the same chunks.
			ix := *r.ix
			ix.DiffID = blockdev.Sum([]byte("another"))
			r.mem.PutDiff(&ix, r.data)
			o := r.add(&ix)
			r.check(o, r.want, 0, len(r.data))
		},
		"scrub": func(r *rig, d blockdev.Digest) {
			if err := r.d.Scrub(r.t.Context()); !errors.Is(err, ErrDamaged) {
				r.t.Errorf("scrub: %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			var told atomic.Int32
			var id blockdev.Digest
			r := newRig(t, 1<<20, func(c *Config) {
				c.Damaged = func(of blockdev.Digest) {
					if of == id {
						told.Add(1)
					}
				}
			})
			id = r.ix.DiffID
			r.prefetch()
			if err := r.d.Scrub(t.Context()); err != nil {
				t.Fatal(err)
			}
			scrubbed := r.d.Scrubbed()
			c := r.ix.Chunks[3]
			flipFile(t, r.d.DataPath(), c.Offset+7)
			find(r, c.Digest)
			if told.Load() != 1 || r.d.Complete() || !r.d.Completed() {
				t.Errorf("told %d times, complete %v", told.Load(), r.d.Complete())
			}
			for range 2 {
				if err := r.d.Scrub(t.Context()); !errors.Is(err, ErrIncomplete) || !r.d.Scrubbed().Equal(scrubbed) {
					t.Errorf("scrub of what is not complete any more: %v, noted as of %v", err, r.d.Scrubbed())
				}
				if in, err := r.d.Verify(t.Context(), false); err != nil || in.DamagedChunks != 1 || in.Complete != 0 {
					t.Errorf("check: %+v, %v", in, err)
				}
			}
			r.prefetch()
			if err := r.d.Scrub(t.Context()); err != nil {
				t.Error(err)
			}
			r.checkRead(0, 1<<20)
		})
	}
}

// TestNotedBeforeSynced: chunks count as synced only once the record that the cache is
// open is on disk: after a power loss, nothing else says that they may be wrong.
func TestNotedBeforeSynced(t *testing.T) {
	r := newRig(t, 1<<20, func(c *Config) { c.SyncInterval = time.Hour })
	for !r.noted.Load() { // in the background
		time.Sleep(time.Millisecond)
	}
	// As if that was still to be done, and cannot be.
	r.noted.Store(false)
	if err := errors.Join(os.Remove(r.openPath()), os.Mkdir(r.openPath(), 0o700)); err != nil {
		t.Fatal(err)
	}
	r.checkRead(0, 300_000)
	r.quiet()
	if err := r.d.sync(t.Context()); err == nil || r.d.pres.SyncedAll(0, 1) {
		t.Errorf("sync without the record: %v, synced %v", err, r.d.pres.SyncedAll(0, 1))
	}
	if err := os.Remove(r.openPath()); err != nil {
		t.Fatal(err)
	}
	if err := r.d.sync(t.Context()); err != nil || !r.d.pres.SyncedAll(0, 1) {
		t.Errorf("sync with the record: %v, synced %v", err, r.d.pres.SyncedAll(0, 1))
	}
	if b, err := os.ReadFile(r.openPath()); err != nil || [16]byte(b) != r.boot {
		t.Errorf("the record is %x, %v", b, err)
	}
}
