package volume

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"testing/synctest"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

// TestLateSource: what is there late keeps the contract of what it asks.
func TestLateSource(t *testing.T) {
	blockdevtest.TestSource(t, func(t *testing.T, data [][]byte) blockdev.Source {
		m := &Manager{late: newLate()}
		src := &blockdevtest.Memory{}
		for _, b := range data {
			src.Put(b)
		}
		if err := m.Attach(Upstream{Source: src}); err != nil {
			t.Fatal(err)
		}
		return m.late
	})
}

// TestAttachDetach: a request waits for its source, gets its errors while that is there,
// and none once it is about to go away.
func TestAttachDetach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Manager{late: newLate(), startups: newStartups(nil, nil)}
		down := errors.New("down")
		fetch := func() (end context.CancelCauseFunc, ended chan error) {
			ctx, end := context.WithCancelCause(t.Context())
			ended = make(chan error, 1)
			go func() { ended <- m.late.Fetch(ctx, blockdev.Request{}, nil) }()
			synctest.Wait()
			return end, ended
		}
		waits := func(ended chan error) {
			t.Helper()
			select {
			case err := <-ended:
				t.Fatalf("ended: %v", err)
			default:
			}
		}
		gone := errors.New("the reader has gone")
		end, left := fetch()
		waits(left)
		end(gone)
		if err := <-left; !errors.Is(err, gone) {
			t.Error(err)
		}
		_, early := fetch()
		waits(early)
		if err := m.Attach(Upstream{}); err == nil {
			t.Error("attached without a source")
		}
		up := Upstream{Source: blockdevtest.SourceFunc(func(context.Context, blockdev.Request, blockdev.Deliver) error { return down })}
		if err := m.Attach(up); err != nil {
			t.Fatal(err)
		}
		if err := <-early; !errors.Is(err, down) {
			t.Error(err)
		}
		if err := m.Attach(up); err == nil {
			t.Error("attached twice")
		}
		m.Detach()
		end, late := fetch()
		waits(late)
		end(gone)
		if err := <-late; !errors.Is(err, gone) {
			t.Error(err)
		}
		m.Detach()
	})
}

// TestReadsWaitForUpstream: a read that misses bytes waits until this process has an
// Upstream; and if it fails when that is about to go away, until the next process has one.
func TestReadsWaitForUpstream(t *testing.T) {
	k := newKeeper(t)
	n := newNode(t, func(c *Config) { c.Keep, c.Cache.ReadAhead = k, -1 })
	l := newLayer(t, 90, 4<<20)
	n.add(l)
	f, err := os.Open(filepath.Join(n.mountDir(l), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := func(off int64) chan error {
		ended := make(chan error, 1)
		go func() {
			buf := make([]byte, 4096)
			_, err := f.ReadAt(buf, off)
			if err == nil && !bytes.Equal(buf, l.content[off:off+4096]) {
				err = errors.New("other bytes")
			}
			ended <- err
		}()
		return ended
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if n.Manager, err = Open(ctx, n.cfg); err != nil {
		t.Fatal(err)
	}
	ended := read(0)
	for n.Waiting(0)[0] == 0 {
		runtime.Gosched()
	}
	failed := make(chan struct{}, 1)
	up := n.up
	up.Source = blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		err := n.src.Fetch(ctx, req, deliver)
		if err != nil {
			select {
			case failed <- struct{}{}:
			default:
			}
		}
		return err
	})
	if err := n.Attach(up); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatalf("a read before there was a source: %v", err)
	}
	n.Detach()
	n.src.turn(blockdev.ErrUnavailable)
	ended = read(2 << 20)
	<-failed
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	n.src.turn(nil)
	n.open()
	if err := <-ended; err != nil {
		t.Errorf("a read of when the source went away: %v", err)
	}
}
