package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

func TestReadsAreRight(t *testing.T) {
	for _, size := range []int{1, 511, 4096, 100_000, 3<<20 + 17} {
		r := newRig(t, size, nil)
		rng := rand.New(rand.NewPCG(1, uint64(size)))
		for range 60 {
			off := rng.Int64N(r.d.Size())
			r.checkRead(off, 1+rng.IntN(300_000))
		}
		r.checkRead(0, int(r.d.Size()))
		r.checkRead(0, int(r.d.Size())+1)
		if n := r.present(); n != r.d.tab.Len() {
			t.Errorf("%d of %d chunks present after everything was read", n, r.d.tab.Len())
		}
		p := make([]byte, 10)
		if n, err := r.d.ReadAt(t.Context(), p, r.d.Size()); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("read at the end: %d, %v", n, err)
		}
		if _, err := r.d.ReadAt(t.Context(), p, -1); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("read at -1: %v", err)
		}
		if n, err := r.d.ReadAt(t.Context(), nil, 0); n != 0 || err != nil {
			t.Errorf("read of nothing: %d, %v", n, err)
		}
	}
}

// TestReadLargerThanARequest: one call may span many requests.
func TestReadLargerThanARequest(t *testing.T) {
	r := newRig(t, 5<<20, nil)
	r.checkRead(100, 4<<20)
}

func TestEmptyDiff(t *testing.T) {
	r := newRig(t, 0, nil)
	if n, err := r.d.ReadAt(t.Context(), make([]byte, 1), 0); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read of an empty diff: %d, %v", n, err)
	}
	r.prefetch()
	r.reopen()
	if !r.d.Complete() {
		t.Error("not complete after the cache was opened again")
	}
}

func TestFactsAndFiles(t *testing.T) {
	r := newRig(t, 1<<20+1, nil)
	if r.d.ID() != r.ix.DiffID || r.d.DiffSize() != 1<<20+1 || r.d.Size() != 1<<20+4096 {
		t.Errorf("ID %v, DiffSize %d, Size %d", r.d.ID(), r.d.DiffSize(), r.d.Size())
	}
	if meta, err := os.ReadFile(r.d.MetaPath()); err != nil || !bytes.Equal(meta, r.ix.Meta) {
		t.Errorf("meta file: %d bytes, %v", len(meta), err)
	}
	if st, err := os.Stat(r.d.DataPath()); err != nil || st.Size() != r.d.Size() {
		t.Errorf("data file: %v, %v", st, err)
	}
	ix, err := r.d.Index()
	if err != nil || ix.DiffID != r.ix.DiffID || len(ix.Chunks) != len(r.ix.Chunks) {
		t.Errorf("index read again: %v", err)
	}
	if s := r.d.Stat(); s.ChunksPresent != 0 || s.Chunks != len(r.ix.Chunks) || s.Bytes != 1<<20+1 || s.Complete {
		t.Errorf("%+v", s)
	}
	r.prefetch()
	if s := r.d.Stat(); s.ChunksPresent != s.Chunks || s.BytesPresent != s.Bytes || !s.Complete || s.ID != r.ix.DiffID {
		t.Errorf("%+v", s)
	}
	if s := r.Stats(); s.PrefetchBytes != 1<<20+1 || s.DemandBytes != 0 {
		t.Errorf("%+v", s)
	}
}

func TestLocal(t *testing.T) {
	r := newRig(t, 1<<20+1, nil)
	if _, ok := r.d.Local(0, 1); ok {
		t.Error("nothing is present, but Local says so")
	}
	tail := r.d.DiffSize()
	if f, ok := r.d.Local(tail, int(r.d.Size()-tail)); !ok || f == nil {
		t.Error("the zeros behind the diff are always there")
	}
	r.prefetch()
	f, ok := r.d.Local(0, int(r.d.Size()))
	if !ok {
		t.Fatal("everything is present, but Local does not say so")
	}
	got := make([]byte, r.d.Size())
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, r.want) {
		t.Errorf("the file of Local has other bytes: %v", err)
	}
	for _, bad := range []struct {
		off int64
		n   int
	}{{-1, 1}, {0, -1}, {r.d.Size(), 1}, {1, int(r.d.Size())}, {1 << 62, 1 << 62}} {
		if _, ok := r.d.Local(bad.off, bad.n); ok {
			t.Errorf("Local(%d, %d) is no range of the file", bad.off, bad.n)
		}
	}
}

func TestAddIsIdempotentAndConcurrent(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	ix, data := blockdevtest.Diff(77, 1<<20)
	r.mem.PutDiff(ix, data)
	enc := encode(t, ix)
	var wg sync.WaitGroup
	got := make([]*Diff, 8)
	for i := range got {
		wg.Go(func() {
			d, err := r.Add(context.Background(), enc)
			if err != nil {
				t.Error(err)
			}
			got[i] = d
		})
	}
	wg.Wait()
	for _, d := range got {
		if d != got[0] {
			t.Fatal("Add of the same index gave two diffs")
		}
	}
	if n := len(r.Diffs()); n != 2 {
		t.Errorf("%d diffs", n)
	}
	if left, err := os.ReadDir(filepath.Join(r.cfg.Root, tmpDir)); err != nil || len(left) > 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
}

func TestAddRefusesWhatIsNoIndex(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	enc := encode(t, r.ix)
	enc[len(enc)/2] ^= 1
	for _, b := range [][]byte{nil, []byte("not an index"), enc} {
		if _, err := r.Add(t.Context(), b); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("Add: %v, want ErrCorrupt", err)
		}
	}
}

func TestOpenTwice(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	if c, err := Open(t.Context(), r.cfg); err == nil {
		t.Error("two caches have the same directory open", c.Close())
	}
}

func TestConfigIsChecked(t *testing.T) {
	r := newRig(t, 1<<10, nil)
	for name, change := range map[string]func(*Config){
		"no root":       func(c *Config) { c.Root = "" },
		"no source":     func(c *Config) { c.Source = nil },
		"no log":        func(c *Config) { c.Log = nil },
		"negative":      func(c *Config) { c.Timeout = -1 },
		"demand window": func(c *Config) { c.DemandBytes = 1000 },
	} {
		cfg := r.cfg
		cfg.Root = t.TempDir()
		change(&cfg)
		if c, err := Open(t.Context(), cfg); err == nil {
			t.Errorf("%s: accepted", name)
			_ = c.Close()
		}
	}
}

func TestRemove(t *testing.T) {
	r := newRig(t, 2<<20, nil)
	r.checkRead(0, 1<<20)
	dir := r.d.dir
	if err := r.Remove(t.Context(), r.ix.DiffID); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory of a removed diff: %v", err)
	}
	if _, ok := r.Get(r.ix.DiffID); ok {
		t.Error("Get finds a removed diff")
	}
	for _, off := range []int64{0, 1 << 20} { // present, and missing
		if _, err := r.d.ReadAt(t.Context(), make([]byte, 10), off); !errors.Is(err, ErrRemoved) {
			t.Errorf("read of a removed diff: %v", err)
		}
	}
	if err := r.d.Prefetch(t.Context()); !errors.Is(err, ErrRemoved) {
		t.Errorf("prefetch of a removed diff: %v", err)
	}
	if err := r.Remove(t.Context(), r.ix.DiffID); err != nil {
		t.Errorf("remove what is not there: %v", err)
	}
	r.d = r.add(r.ix)
	if n := r.present(); n != 0 {
		t.Errorf("%d chunks present in a new diff", n)
	}
	r.checkRead(0, 2<<20)
}

func TestRemoveEndsReadsAndPrefetch(t *testing.T) {
	r := newRig(t, 4<<20, nil)
	asked := make(chan struct{}, 100)
	r.source(func(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
		asked <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	errs := make(chan error, 2)
	go func() {
		_, err := r.d.ReadAt(context.Background(), make([]byte, 10), 0)
		errs <- err
	}()
	<-asked
	go func() { errs <- r.d.Prefetch(context.Background()) }()
	<-asked
	if err := r.Remove(t.Context(), r.ix.DiffID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-errs; !errors.Is(err, ErrRemoved) {
			t.Errorf("ended with %v, want ErrRemoved", err)
		}
	}
}

func TestCloseEndsReads(t *testing.T) {
	r := newRig(t, 4<<20, nil)
	asked := make(chan struct{})
	r.source(func(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
		close(asked)
		<-ctx.Done()
		return ctx.Err()
	})
	errs := make(chan error)
	go func() {
		_, err := r.d.ReadAt(context.Background(), make([]byte, 10), 0)
		errs <- err
	}()
	<-asked
	r.close()
	if err := <-errs; !errors.Is(err, ErrClosed) {
		t.Errorf("ended with %v, want ErrClosed", err)
	}
	if _, err := r.Add(t.Context(), encode(t, r.ix)); !errors.Is(err, ErrClosed) {
		t.Errorf("Add: %v", err)
	}
}

func TestReopen(t *testing.T) {
	r := newRig(t, 3<<20, nil)
	r.checkRead(1<<20, 300_000)
	r.quiet()
	n := r.present()
	r.reopen()
	if m := r.present(); m != n || n == 0 {
		t.Errorf("%d chunks present, %d before", m, n)
	}
	r.prefetch()
	r.reopen()
	if !r.d.Complete() {
		t.Error("complete before, not after")
	}
	r.mem.Record()
	r.checkRead(0, 3<<20)
	if reqs := r.mem.Requests(); len(reqs) != 0 {
		t.Errorf("%d requests for a complete diff", len(reqs))
	}
}

// TestPrefetchChecksWhatItDidNotWrite: bytes that rotted while no process looked
// are found before the diff is called complete.
func TestPrefetchChecksWhatItDidNotWrite(t *testing.T) {
	r := newRig(t, 3<<20, nil)
	r.checkRead(0, 1<<20)
	r.crash(func() { flipFile(t, r.d.DataPath(), 70_000) })
	r.expect()
	r.prefetch()
	if r.Stats().DamagedChunks != 1 || r.log.count("damaged") != 1 {
		t.Errorf("damaged chunks: %d in the counters, %d in the log", r.Stats().DamagedChunks, r.log.count("damaged"))
	}
	if n := r.present(); n != r.d.tab.Len() {
		t.Errorf("%d of %d chunks", n, r.d.tab.Len())
	}
}

func flipFile(t testing.TB, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x40
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}
