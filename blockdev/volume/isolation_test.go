package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
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
	n := newNode(t, func(c *Config) { c.ReadTimeout, c.Cache.Timeout = time.Hour, time.Hour },
		func(u *Upstream) { src.Source, u.Source = u.Source, src })
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
	within(t, "the reads that were answered to wait no more", func() {
		for n.Waiting(0)[0] != readers { // a read is counted until shortly after its answer
			runtime.Gosched()
		}
	})
	u := n.Uses()
	if u.Reads.Used != readers || u.Readers.Used != readers || u.Reads.Capacity <= readers {
		t.Errorf("%d reads wait, and the gauges say %+v", readers, u)
	}
	if u.DemandBytes.Used == 0 || u.DemandBytes.Used > u.DemandBytes.Capacity {
		t.Errorf("bytes in flight for them: %+v", u.DemandBytes)
	}
	if c := n.Counters(); c.Failed != 0 {
		t.Errorf("%d reads failed", c.Failed)
	}
	close(src.open)
	wg.Wait()
}

// TestOldConnectionIsWidened: a connection that an earlier version has opened, with room
// for few reads, gets the limits of this one when it is taken over.
func TestOldConnectionIsWidened(t *testing.T) {
	k := newKeeper(t)
	n := newNode(t, func(c *Config) { c.Keep = k })
	l := newLayer(t, 70, 1<<20)
	n.add(l)
	dir := n.mountDir(l)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	// What the earlier version has agreed on, in the record and in the kernel.
	record := k.Take(keptInit)
	defer record.Close()
	b, err := io.ReadAll(io.NewSectionReader(record, 0, recordMost))
	if err != nil {
		t.Fatal(err)
	}
	_, minor, init, err := decodeConnection(b)
	if err != nil {
		t.Fatal(err)
	}
	const recordHead, outHeader, inFuseInitOut = 16, 16, 16
	at := recordHead + int64(binary.NativeEndian.Uint32(init)) + outHeader + inFuseInitOut
	if got := binary.NativeEndian.Uint16(b[at:]); got != 65535 {
		t.Fatalf("the record does not have max_background at %d but %d", at, got)
	}
	if _, err := record.WriteAt(binary.NativeEndian.AppendUint16(nil, 128), at); err != nil {
		t.Fatal(err)
	}
	ctl := t.TempDir()
	if err := unix.Mount("fusectl", ctl, "fusectl", 0, ""); err != nil {
		t.Skip("needs a kernel with fusectl: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(ctl, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	limit := filepath.Join(ctl, strconv.Itoa(minor), "max_background")
	if err := os.WriteFile(limit, []byte("128"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.open()
	if got, err := os.ReadFile(limit); err != nil || strings.TrimSpace(string(got)) != "65535" {
		t.Errorf("max_background is %s after the connection was taken over, %v", got, err)
	}
	n.check(l, dir)
}
