package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// small makes runs that tests can have several of. No background work.
func small(dir string) Config {
	return Config{Dir: dir, Idle: -1, stepBytes: 100 << 10, runBytes: 400 << 10}
}

// withNoise adds chunks that do not compress.
func withNoise(l fakeLayer, n int) fakeLayer {
	r := rand.NewChaCha8([32]byte{77})
	for range n {
		c := make([]byte, 20<<10)
		fillRandom(r, c)
		l.chunks = append(l.chunks, c)
	}
	return l
}

func (l fakeLayer) size() (n int64) {
	for _, c := range l.chunks {
		n += int64(len(c))
	}
	return n
}

// compressAll does what the background does, without its pauses.
func compressAll(s *Store) error {
	r := newRun(s)
	defer r.drop()
	for s.Stats().DueBytes > 0 {
		more, err := r.step()
		if err == nil && (!more || r.raw >= s.cfg.runBytes) {
			err = r.commit()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// compressed counts the chunks of l that are stored as zstd.
func compressed(t testing.TB, s *Store, l fakeLayer) (n int) {
	t.Helper()
	for _, c := range l.chunks {
		got, err := s.Chunk(t.Context(), blockdev.Sum(c))
		if err != nil {
			t.Fatal(err)
		}
		if got.Zstd {
			n++
		}
	}
	return n
}

// Raw after the ingest; compressed, and less on disk, when the store was idle.
func TestCompressesWhenIdle(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := open(t, Config{Dir: dir, stepBytes: 100 << 10, runBytes: 400 << 10})
		l := withNoise(newLayer(1, 100), 10)
		publish(t, s, l)
		check(t, s, l)
		if n := compressed(t, s, l); n != 0 {
			t.Fatalf("%d chunks compressed at once", n)
		}
		if st := s.Stats(); st.DueBytes != l.size() || st.StoredBytes != l.size() {
			t.Fatalf("%+v, want %d bytes due", st, l.size())
		}
		before := du(t, dir)
		time.Sleep(defaultIdle - time.Millisecond)
		synctest.Wait()
		if st := s.Stats(); st.DueBytes != l.size() {
			t.Fatalf("%d of %d bytes due before the store was idle", st.DueBytes, l.size())
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		st := s.Stats()
		if st.DueBytes != 0 {
			t.Fatalf("%d bytes due after the store was idle", st.DueBytes)
		}
		check(t, s, l)
		if n := compressed(t, s, l); n != 100 {
			t.Errorf("%d chunks compressed, want 100", n)
		}
		if after := du(t, dir); after > before*2/3 || st.Used != after {
			t.Errorf("%d bytes on disk before, %d after, %d accounted for", before, after, st.Used)
		}
		if st.StoredBytes >= l.size()*2/3 {
			t.Errorf("%d bytes stored of %d", st.StoredBytes, l.size())
		}
	})
	checkAccounts(t, dir)
}

// An ingest that begins stops it, and what is done by then is kept; serving
// slows it down.
func TestPauses(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		cfg := small(dir)
		cfg.Idle = defaultIdle
		cfg.runBytes = 1 << 30
		s := open(t, cfg)
		l := newLayer(1, 100)
		publish(t, s, l)
		serve := func() {
			t.Helper()
			if _, err := s.Chunk(t.Context(), blockdev.Sum(l.chunks[0])); err != nil {
				t.Fatal(err)
			}
		}
		// Served all the time: a step a second, of seven chunks each, and no
		// more. They are committed when an ingest begins.
		for range (defaultIdle + 3*time.Second) / (250 * time.Millisecond) {
			time.Sleep(250 * time.Millisecond)
			serve()
		}
		synctest.Wait()
		other := newLayer(2, 10)
		in := put(t, s, other)
		synctest.Wait()
		left := s.Stats().DueBytes
		if done := l.size() - left; done < 2*cfg.stepBytes || done > 6*cfg.stepBytes {
			t.Fatalf("%d bytes compressed within 3 s of the time for it", done)
		}
		time.Sleep(time.Hour)
		if n := s.Stats().DueBytes; n != left {
			t.Fatalf("%d bytes due, %d when the ingest began", n, left)
		}
		in.Abort()
		time.Sleep(defaultIdle + time.Millisecond)
		synctest.Wait()
		if n := s.Stats().DueBytes; n != 0 {
			t.Fatalf("%d bytes due after the ingest", n)
		}
		check(t, s, l)
	})
	checkAccounts(t, dir)
}

// An ingest that begins in the middle of a step ends it.
func TestIngestEndsStep(t *testing.T) {
	dir := t.TempDir()
	cfg := small(dir)
	s := open(t, cfg)
	l := newLayer(1, 50)
	publish(t, s, l)
	r := newRun(s)
	defer r.drop()
	if more, err := r.step(); !more || err != nil {
		t.Fatal(more, err)
	}
	done := len(r.moves)
	in := put(t, s, newLayer(2, 5))
	if more, err := r.step(); !more || err != nil || len(r.moves) != done {
		t.Fatalf("%d chunks done beside an ingest: %v %v", len(r.moves)-done, more, err)
	}
	// What it has done is committed beside the ingest, which counts on some of it.
	for _, c := range l.chunks {
		if err := in.Put(t.Context(), blockdev.Sum(c), c); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.commit(); err != nil {
		t.Fatal(err)
	}
	b := newLayer(2, 5)
	b.chunks = append(b.chunks, l.chunks...)
	if err := in.Publish(t.Context(), b.rec, b.index, slices.Values(b.digests())); err != nil {
		t.Fatal(err)
	}
	check(t, s, b)
	if n := compressed(t, s, l); n != done {
		t.Errorf("%d chunks compressed, want %d", n, done)
	}
	if err := s.Remove(l.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	check(t, s, b)
	shut(t, s)
	checkAccounts(t, dir)
}

func TestRestartResumes(t *testing.T) {
	dir := t.TempDir()
	l := newLayer(1, 100)
	synctest.Test(t, func(t *testing.T) {
		s := open(t, small(dir))
		publish(t, s, l)
		r := newRun(s)
		if _, err := r.step(); err != nil {
			t.Fatal(err)
		}
		if err := r.commit(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.step(); err != nil {
			t.Fatal(err)
		}
		r.drop() // as Close does
		left := s.Stats().DueBytes
		shut(t, s)
		s = open(t, Config{Dir: dir})
		if n := s.Stats().DueBytes; n != left || n == 0 || n == l.size() {
			t.Fatalf("%d bytes due after the restart, %d before", n, left)
		}
		time.Sleep(defaultIdle + time.Millisecond)
		synctest.Wait()
		if n := s.Stats().DueBytes; n != 0 || compressed(t, s, l) != len(l.chunks) {
			t.Fatalf("%d bytes due", n)
		}
		check(t, s, l)
	})
	checkAccounts(t, dir)
}

// Everything that may happen to chunks between the time a run has read them and
// its commit.
func TestChangesDuringRun(t *testing.T) {
	dir := t.TempDir()
	cfg := small(dir)
	evicted, shared, damaged := newLayer(1, 20), newLayer(2, 20), newLayer(3, 20)
	shared.chunks = append(shared.chunks, evicted.chunks[:10]...)
	var s *Store
	cfg.hook = func(point string) {
		if point != "synced" {
			return
		}
		if err := s.Remove(evicted.rec.DiffID); err != nil {
			t.Error(err)
		}
		bad := blockdev.Sum(damaged.chunks[3])
		r, _, err := s.db.chunk(bad)
		if err != nil {
			t.Error(err)
		}
		flip(t, s.packs.path(r.Pack), r.Offset)
		if _, err := s.Chunk(t.Context(), bad); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("damaged chunk: %v", err)
		}
		publish(t, s, damaged) // heals
	}
	cfg.runBytes = 1 << 30
	s = open(t, cfg)
	for _, l := range []fakeLayer{evicted, shared, damaged} {
		publish(t, s, l)
	}
	r := newRun(s)
	for {
		more, err := r.step()
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			break
		}
	}
	if err := r.commit(); err != nil {
		t.Fatal(err)
	}
	checkGone(t, s, fakeLayer{rec: evicted.rec, chunks: evicted.chunks[10:]})
	check(t, s, shared)
	check(t, s, damaged)
	if n, m := compressed(t, s, shared), compressed(t, s, damaged); n != 30 || m != 19 {
		t.Errorf("%d and %d chunks compressed, want 30 and 19", n, m)
	}
	if n := s.Stats().DueBytes; n != int64(len(damaged.chunks[3])) {
		t.Errorf("%d bytes due, want the healed chunk", n)
	}
	shut(t, s)
	checkAccounts(t, dir)
}

// A run finds damage, and all chunks of a run may be gone when it commits.
func TestRunFindsDamage(t *testing.T) {
	dir := t.TempDir()
	cfg := small(dir)
	s := open(t, cfg)
	a, b := newLayer(1, 10), newLayer(2, 5)
	publish(t, s, a)
	publish(t, s, b)
	bad := blockdev.Sum(a.chunks[3])
	rec, _, _ := s.db.chunk(bad)
	flip(t, s.packs.path(rec.Pack), rec.Offset+3)
	if err := compressAll(s); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Layer(a.rec.Layer); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("layer with a damaged chunk: %v", err)
	}
	check(t, s, b)
	publish(t, s, a)
	check(t, s, a)

	gone := newLayer(3, 10)
	publish(t, s, gone)
	r := newRun(s)
	if _, err := r.step(); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(gone.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(a.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	if err := r.commit(); err != nil {
		t.Fatal(err)
	}
	check(t, s, b)
	shut(t, s)
	checkAccounts(t, dir)
}

// Little room below the quota: done in small portions, and the quota holds.
func TestLittleRoom(t *testing.T) {
	dir := t.TempDir()
	cfg := small(dir)
	cfg.runBytes = 1 << 30
	s := open(t, cfg)
	l := newLayer(1, 300)
	publish(t, s, l)
	defer s.Pin(l.rec.DiffID)()
	used := s.Stats().Used
	s.space.quota = used + 1000
	if err := compressAll(s); !errors.Is(err, errNoRoom) {
		t.Fatalf("no room: %v", err)
	}
	check(t, s, l)
	s.space.quota = used + runSlack + 50<<10
	runs := 0
	s.cfg.hook = func(point string) {
		if point == "committed" {
			runs++
			if n := du(t, dir); n > s.space.quota {
				t.Errorf("%d bytes on disk, quota %d", n, s.space.quota)
			}
		}
	}
	if err := compressAll(s); err != nil {
		t.Fatal(err)
	}
	if runs < 2 || s.Stats().DueBytes != 0 || s.Stats().Used >= used {
		t.Errorf("%d runs, %+v", runs, s.Stats())
	}
	check(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}

// Readers, evictions and ingests beside recompression: every read is right or
// "not found", and nothing is taken for damage.
func TestConcurrentRuns(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	keep := newLayer(1000, 40)
	publish(t, s, keep)
	all := append([][]byte(nil), keep.chunks...)
	var ls []fakeLayer
	for i := range uint64(6) {
		l := newLayer(i, 30)
		all = append(all, l.chunks...)
		l.chunks = append(l.chunks, keep.chunks[:10]...)
		ls = append(ls, l)
	}
	ctx, stop := context.WithCancel(t.Context())
	var readers, workers sync.WaitGroup
	for w := range 3 {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for ctx.Err() == nil {
				i := rnd.IntN(len(all))
				got, err := s.Chunk(context.Background(), blockdev.Sum(all[i]))
				if errors.Is(err, blockdev.ErrNotFound) && i >= len(keep.chunks) {
					continue
				}
				if err != nil || !bytes.Equal(raw(t, got), all[i]) {
					t.Errorf("chunk %d: %v, or wrong bytes", i, err)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	workers.Go(func() {
		defer close(done)
		for i := range 40 {
			l := ls[i%len(ls)]
			in, err := s.Begin(l.rec.Layer)
			if err != nil {
				t.Error(err)
				return
			}
			for _, c := range l.chunks {
				err = errors.Join(err, in.Put(context.Background(), blockdev.Sum(c), c))
			}
			err = errors.Join(err, in.Publish(context.Background(), l.rec, l.index, slices.Values(l.digests())))
			if i >= 3 {
				err = errors.Join(err, s.Remove(ls[(i-3)%len(ls)].rec.DiffID))
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	workers.Go(func() {
		for {
			if err := compressAll(s); err != nil && !errors.Is(err, errNothing) {
				t.Error(err)
				return
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	workers.Wait()
	stop()
	readers.Wait()
	if err := compressAll(s); err != nil {
		t.Fatal(err)
	}
	check(t, s, keep)
	if st := s.Stats(); st.Damaged != 0 || st.DueBytes != 0 {
		t.Errorf("%+v", st)
	}
	if n := compressed(t, s, keep); n != len(keep.chunks) {
		t.Errorf("%d chunks compressed", n)
	}
	shut(t, s)
	checkAccounts(t, dir)
}

const childEnv = "SHOAL_TEST_STORE_CHILD"

// childMain compresses, and kills itself the second time it comes to a point.
func childMain(args string) {
	dir, at, _ := strings.Cut(args, "|")
	cfg := small(dir)
	n := 0
	cfg.hook = func(point string) {
		if point == at {
			if n++; n == 2 {
				if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
					panic(err)
				}
				select {} // until it arrives
			}
		}
	}
	s, err := Open(cfg)
	if err == nil {
		err = compressAll(s)
	}
	fmt.Println("not killed:", err)
	os.Exit(1)
}

// kill -9 at every point of a run: all chunks are there, and no space is lost.
func TestKilled(t *testing.T) {
	for _, point := range []string{"written", "synced", "committed"} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, small(dir))
			l := withNoise(newLayer(1, 100), 10)
			publish(t, s, l)
			shut(t, s)
			cmd := exec.CommandContext(t.Context(), os.Args[0])
			cmd.Env = append(os.Environ(), childEnv+"="+dir+"|"+point)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("child: %v: %s", err, out)
			}
			s = open(t, small(dir))
			check(t, s, l)
			if n := s.Stats().DueBytes; n == 0 || n >= l.size() {
				t.Errorf("%d of %d bytes due: nothing was committed, or nothing left", n, l.size())
			}
			shut(t, s)
			checkAccounts(t, dir)
			s = open(t, small(dir))
			if err := compressAll(s); err != nil {
				t.Fatal(err)
			}
			check(t, s, l)
			if n := compressed(t, s, l); n != 100 {
				t.Errorf("%d chunks compressed, want 100", n)
			}
			shut(t, s)
			checkAccounts(t, dir)
			// As small as a store that was never killed.
			ref := t.TempDir()
			s = open(t, small(ref))
			publish(t, s, l)
			if err := compressAll(s); err != nil {
				t.Fatal(err)
			}
			shut(t, s)
			got, want := du(t, filepath.Join(dir, "packs")), du(t, filepath.Join(ref, "packs"))
			if got > want+64<<10 {
				t.Errorf("packs take %d bytes, %d without the crash", got, want)
			}
		})
	}
}

// Close drops a run that is not committed, and does not wait for the rest of it.
func TestCloseDuringRun(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		cfg := small(dir)
		cfg.Idle = defaultIdle
		cfg.runBytes = 1 << 30
		s := open(t, cfg)
		l := newLayer(1, 100)
		publish(t, s, l)
		time.Sleep(defaultIdle - time.Millisecond)
		checkChunks(t, s, l) // so that there is one step, and then a pause
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if ids, err := s.packs.list(); err != nil || len(ids) != 2 {
			t.Fatalf("packs %v, %v: no run is open", ids, err)
		}
		begin := time.Now()
		shut(t, s)
		if d := time.Since(begin); d != 0 {
			t.Errorf("Close waited %v", d)
		}
		if ids, err := s.packs.list(); err != nil || len(ids) != 1 {
			t.Errorf("packs %v, %v after Close", ids, err)
		}
		s = open(t, small(dir))
		if n := s.Stats().DueBytes; n != l.size() {
			t.Errorf("%d bytes due, want %d", n, l.size())
		}
		check(t, s, l)
	})
	checkAccounts(t, dir)
}
