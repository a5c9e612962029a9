package volume

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// gatedSource does not answer for one diff until open is closed.
type gatedSource struct {
	blockdev.Source
	diff blockdev.Digest
	open chan struct{}
}

func (s *gatedSource) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	if req.Diff == s.diff {
		select {
		case <-s.open:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return s.Source.Fetch(ctx, req, deliver)
}

// within fails the test if f takes longer than any healthy machine would.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal(what + ": hangs")
	}
}

// TestHungImageStallsNobody has hundreds of threads wait for bytes of one layer, which
// come only when everything else has been done: a layer that is complete and mounted
// lazily has been read, the bytes of another that are missing but to be had, and a new
// layer was added, mounted and read.
func TestHungImageStallsNobody(t *testing.T) {
	const readers = 500
	hung, complete, missing, fresh := newLayer(t, 1, 100<<20), newLayer(t, 2, 3<<20), newLayer(t, 3, 3<<20), newLayer(t, 4, 3<<20)
	src := &gatedSource{diff: hung.id, open: make(chan struct{})}
	n := newNode(t, func(c *Config) {
		src.Source = c.Source
		c.Source, c.ReadTimeout, c.Cache.Timeout = src, time.Hour, time.Hour
	})
	n.add(complete)
	completeDir := n.mountDir(complete)
	if err := n.PrefetchWait(t.Context(), complete.id, nil); err != nil {
		t.Fatal(err)
	}
	for _, l := range []*layer{hung, missing} {
		n.add(l)
	}
	f, err := os.Open(filepath.Join(n.mountDir(hung), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range int64(readers) {
		wg.Go(func() {
			b, off := make([]byte, 4096), i*200_000
			if _, err := f.ReadAt(b, off); err != nil || !bytes.Equal(b, hung.content[off:off+4096]) {
				t.Errorf("a read of the hung layer: %v, or other bytes", err)
			}
		})
	}
	within(t, "the kernel gives out all reads", func() {
		for n.Waiting(0)[0] < readers {
			runtime.Gosched()
		}
	})
	within(t, "a read of a complete layer", func() { n.check(complete, completeDir) })
	within(t, "a read of missing bytes that are to be had", func() { n.check(missing, n.mountDir(missing)) })
	within(t, "a new layer", func() {
		n.add(fresh)
		n.check(fresh, n.mountDir(fresh))
	})
	if got := n.Waiting(0)[0]; got != readers {
		t.Errorf("%d reads are said to wait, %d do", got, readers)
	}
	if c := n.Counters(); c.Failed != 0 {
		t.Errorf("%d reads failed", c.Failed)
	}
	close(src.open)
	wg.Wait()
}
