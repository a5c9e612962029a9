package store

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

func TestQuotaHolds(t *testing.T) {
	dir := t.TempDir()
	const quota = 4 << 20
	s := open(t, Config{Dir: dir, Quota: quota})
	first := newLayer(0, 60)
	publish(t, s, first)
	defer s.Pin(first.rec.DiffID)()
	for i := uint64(1); i < 30; i++ {
		l := newLayer(i, 60)
		publish(t, s, l)
		check(t, s, l)
		if n := du(t, dir); n > quota {
			t.Fatalf("after layer %d: %d bytes on disk, quota %d", i, n, quota)
		}
		check(t, s, first) // pinned
	}
	if st := s.Stats(); st.Evicted == 0 || st.Used > quota {
		t.Errorf("stats %+v", st)
	}
	checkGone(t, s, newLayer(1, 60))
	// More than the quota: refused, and says what to do.
	big := newLayer(99, 600)
	in, err := s.Begin(big.rec.Layer)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range big.chunks {
		if err = in.Put(t.Context(), blockdev.Sum(c), c); err != nil {
			break
		}
	}
	if !errors.Is(err, blockdev.ErrNoSpace) || !bytes.Contains([]byte(err.Error()), []byte("store.quota")) {
		t.Fatalf("Put beyond the quota: %v", err)
	}
	if err := in.Publish(t.Context(), big.rec, big.index, slices.Values[[]blockdev.Digest](nil)); err == nil {
		t.Error("published after a failed Put")
	}
	check(t, s, first)
	publish(t, s, newLayer(50, 60))
	shut(t, s)
	checkAccounts(t, dir)
	// A smaller quota holds from the start.
	open(t, Config{Dir: dir, Quota: 1 << 20})
	if n := du(t, dir); n > 1<<20 {
		t.Errorf("%d bytes on disk after the quota was lowered to 1 MiB", n)
	}
}

// TestClockJumps: what was used while the clock was ahead is not the last to be evicted
// for as long, neither when it is put right nor after a restart.
func TestClockJumps(t *testing.T) {
	for name, restart := range map[string]bool{"at once": false, "after a restart": true} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, Config{Dir: dir})
			var ls []fakeLayer
			for i := range uint64(3) {
				ls = append(ls, newLayer(i, 10))
				publish(t, s, ls[i])
			}
			s.catalogue.mu.Lock()
			s.catalogue.now = func() time.Time { return time.Now().AddDate(1, 0, 0) }
			s.catalogue.mu.Unlock()
			s.Touch(ls[0].rec.DiffID)
			s.catalogue.mu.Lock()
			s.catalogue.now = time.Now
			s.catalogue.mu.Unlock()
			if restart {
				shut(t, s)
				s = open(t, Config{Dir: dir})
			}
			s.Touch(ls[2].rec.DiffID)
			s.Touch(ls[1].rec.DiffID)
			for _, want := range []int{0, 2, 1} {
				if ok, err := s.evictOne(); !ok || err != nil {
					t.Fatal(ok, err)
				}
				checkGone(t, s, ls[want])
			}
		})
	}
}

func TestEvictsLeastRecentlyUsed(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	var ls []fakeLayer
	for i := range uint64(3) {
		ls = append(ls, newLayer(i, 10))
		publish(t, s, ls[i])
	}
	if !s.Touch(ls[0].rec.DiffID) {
		t.Fatal("Touch")
	}
	for _, want := range []int{1, 2, 0} {
		if ok, err := s.evictOne(); !ok || err != nil {
			t.Fatal(ok, err)
		}
		checkGone(t, s, ls[want])
	}
	if ok, err := s.evictOne(); ok || err != nil {
		t.Fatalf("evicted from an empty store: %v %v", ok, err)
	}
}

// An eviction while an ingest counts on a chunk of the evicted diff.
func TestIngestHoldsChunks(t *testing.T) {
	for _, how := range []string{"publish", "abort", "crash"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, Config{Dir: dir})
			a, b := newLayer(1, 50), newLayer(2, 10)
			b.chunks = append(b.chunks, a.chunks[:20]...)
			publish(t, s, a)
			in := put(t, s, b)
			if err := s.Remove(a.rec.DiffID); err != nil {
				t.Fatal(err)
			}
			checkGone(t, s, fakeLayer{rec: a.rec, chunks: a.chunks[20:]})
			checkChunks(t, s, b)
			switch how {
			case "publish":
				if err := in.Publish(t.Context(), b.rec, b.index, slices.Values(b.digests())); err != nil {
					t.Fatal(err)
				}
				check(t, s, b)
			case "abort":
				in.Abort()
				checkGone(t, s, b)
			case "crash":
				if err := s.db.Close(); err != nil { // nothing more reaches the disk
					t.Fatal(err)
				}
				shut(t, s)
				s = open(t, Config{Dir: dir})
				checkGone(t, s, b)
			}
			shut(t, s)
			checkAccounts(t, dir)
		})
	}
}

// Readers, ingests and evictions at once: every read is right or "not found".
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir, Quota: 3 << 20})
	shared := newLayer(1000, 20)
	var ls []fakeLayer
	for i := range uint64(8) {
		l := newLayer(i, 40)
		l.chunks = append(l.chunks, shared.chunks...)
		ls = append(ls, l)
	}
	ctx, stop := context.WithCancel(t.Context())
	var readers, writers sync.WaitGroup
	var hits atomic.Int64
	for w := range 4 {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for ctx.Err() == nil {
				l := ls[rnd.IntN(len(ls))]
				c := l.chunks[rnd.IntN(len(l.chunks))]
				got, err := s.Chunk(context.Background(), blockdev.Sum(c))
				switch {
				case errors.Is(err, blockdev.ErrNotFound):
				case err != nil:
					t.Error(err)
					return
				case blockdev.Sum(raw(t, got)) != blockdev.Sum(c):
					t.Error("wrong bytes")
					return
				default:
					hits.Add(1)
				}
				if _, err := s.Index(context.Background(), l.rec.DiffID); err != nil && !errors.Is(err, blockdev.ErrNotFound) {
					t.Error(err)
					return
				}
			}
		})
	}
	for w := range 3 {
		writers.Go(func() {
			for i := range 20 {
				l := ls[(i*3+w)%len(ls)]
				in, err := s.Begin(l.rec.Layer)
				if err != nil {
					t.Error(err)
					return
				}
				for _, c := range l.chunks {
					if err = in.Put(context.Background(), blockdev.Sum(c), c); err != nil {
						break
					}
				}
				if err == nil && i%5 == 4 {
					in.Abort()
					continue
				}
				if err == nil {
					err = in.Publish(context.Background(), l.rec, l.index, slices.Values(l.digests()))
				}
				in.Abort()
				if err != nil && !errors.Is(err, blockdev.ErrNoSpace) {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	stop()
	readers.Wait()
	if hits.Load() == 0 || s.Stats().Evicted == 0 {
		t.Errorf("%d hits, %+v: the test tested nothing", hits.Load(), s.Stats())
	}
	if n := du(t, dir); n > 3<<20 {
		t.Errorf("%d bytes on disk, quota 3 MiB", n)
	}
	shut(t, s)
	checkAccounts(t, dir)
}

func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, Config{Dir: dir, Quota: 1 << 40})
	defer shut(t, s)
	a := newLayer(1, 100)
	publish(t, s, a)
	defer s.Pin(a.rec.DiffID)()
	// Somebody else takes the rest of the disk.
	if err := os.WriteFile(filepath.Join(dir, "other"), make([]byte, 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	big := newLayer(2, 600)
	in, err := s.Begin(big.rec.Layer)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range big.chunks {
		if err = in.Put(t.Context(), blockdev.Sum(c), c); err != nil {
			break
		}
	}
	if !errors.Is(err, blockdev.ErrNoSpace) {
		t.Fatalf("Put on a full disk: %v", err)
	}
	in.Abort()
	checkGone(t, s, big)
	check(t, s, a)
	if err := os.Remove(filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	l := newLayer(3, 50)
	publish(t, s, l)
	check(t, s, l)
}
