package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashChildEnv); dir != "" {
		crashChild(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// logBuffer collects log lines for tests that say that there must be one.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

// rig is a cache over a Source in memory, with one diff.
type rig struct {
	t    testing.TB
	cfg  Config
	mem  *blockdevtest.Memory
	log  *logBuffer
	src  atomic.Pointer[blockdevtest.SourceFunc]
	ix   *blockdev.Index
	data []byte // the masked diff
	want []byte // the same with its zero tail
	*Cache
	d *Diff
}

func encode(t testing.TB, ix *blockdev.Index) []byte {
	t.Helper()
	enc, err := index.Encode(ix)
	if err != nil {
		t.Fatal(err)
	}
	return enc
}

func padded(data []byte) []byte {
	return append(bytes.Clone(data), make([]byte, roundUp(int64(len(data)))-int64(len(data)))...)
}

// newRig makes a cache and adds a diff of size bytes. change may be nil.
func newRig(t testing.TB, size int, change func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, mem: new(blockdevtest.Memory), log: new(logBuffer)}
	r.cfg = Config{
		Root: t.TempDir(),
		Source: blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			return (*r.src.Load())(ctx, req, deliver)
		}),
		Log:    slog.New(slog.NewTextHandler(r.log, nil)),
		bootID: "first boot",
		// No sync behind a test's back unless it wants one.
		SyncInterval: time.Hour,
	}
	r.source(r.mem.Fetch)
	if change != nil {
		change(&r.cfg)
	}
	r.ix, r.data = blockdevtest.Diff(uint64(size), size)
	r.want = padded(r.data)
	r.mem.PutDiff(r.ix, r.data)
	r.open()
	r.d = r.add(r.ix)
	t.Cleanup(r.close)
	return r
}

func (r *rig) open() {
	r.t.Helper()
	c, err := Open(context.Background(), r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	c.Diffs() // all are open, and in the log is what there is to say
	r.Cache = c
}

func (r *rig) close() {
	r.t.Helper()
	if err := r.Close(); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) add(ix *blockdev.Index) *Diff {
	r.t.Helper()
	d, err := r.Add(context.Background(), encode(r.t, ix))
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

// reopen closes the cache and opens it again, and expects the diff there.
func (r *rig) reopen() {
	r.t.Helper()
	r.close()
	r.open()
	r.expect()
}

func (r *rig) expect() {
	r.t.Helper()
	d, ok := r.Get(r.ix.DiffID)
	if !ok {
		r.t.Fatalf("the diff is not there; log:\n%s", r.log.b.String())
	}
	r.d = d
}

// crash opens the cache again without an orderly end, as after a kill -9. What
// the file system holds at this moment is what the next process sees; tests that
// want worse change the files in between.
func (r *rig) crash(between func()) {
	r.t.Helper()
	r.mu.Lock()
	r.closed = true // Close will do nothing
	r.mu.Unlock()
	r.end()
	r.wg.Wait()
	for _, d := range r.Diffs() {
		d.stop(ErrClosed)
		if err := d.closeFiles(); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := r.lock.Close(); err != nil {
		r.t.Fatal(err)
	}
	if between != nil {
		between()
	}
	r.open()
}

// checkRead reads [off, off+n) and compares.
func (r *rig) checkRead(off int64, n int) {
	r.t.Helper()
	r.check(r.d, r.want, off, n)
}

func (r *rig) check(d *Diff, want []byte, off int64, n int) {
	r.t.Helper()
	p := make([]byte, n)
	m, err := d.ReadAt(context.Background(), p, off)
	if err != nil && !(errors.Is(err, io.EOF) && off+int64(m) == d.Size()) {
		r.t.Fatalf("read %d at %d: %v", n, off, err)
	}
	if int64(m) != min(int64(n), d.Size()-off) {
		r.t.Fatalf("read %d at %d: got %d bytes", n, off, m)
	}
	if !bytes.Equal(p[:m], want[off:off+int64(m)]) {
		r.t.Fatalf("read %d at %d: wrong bytes", n, off)
	}
}

func (r *rig) prefetch() {
	r.t.Helper()
	if err := r.d.Prefetch(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	if !r.d.Complete() {
		r.t.Fatal("prefetch returned nil, but the diff is not complete")
	}
}

// present counts the present chunks, and fails if one has wrong bytes on disk.
func (r *rig) present() (n int) {
	r.t.Helper()
	file, err := os.ReadFile(r.d.DataPath())
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range r.d.tab.Len() {
		if !r.d.pres.Has(i) {
			continue
		}
		n++
		c := r.d.tab.Chunk(i)
		if blockdev.Sum(file[c.Offset:][:c.Length]) != c.Digest {
			r.t.Fatalf("chunk %d is called present, but is not right on disk", i)
		}
	}
	return n
}

// source lets a test stand between the cache and the Source in memory.
func (r *rig) source(f blockdevtest.SourceFunc) { r.src.Store(&f) }

// quiet returns when nothing is in flight, read-ahead included.
func (r *rig) quiet() {
	r.t.Helper()
	r.eventually("nothing is in flight", func() bool {
		r.d.flights.mu.Lock()
		defer r.d.flights.mu.Unlock()
		for _, f := range r.d.flights.m {
			if !f.over {
				return false
			}
		}
		return true
	})
}

// eventually looks until ok is true.
func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); runtime.Gosched() {
		if time.Now().After(deadline) {
			r.t.Fatalf("never came true: %s", what)
		}
	}
}
