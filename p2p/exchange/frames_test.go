package exchange

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/shoalfs/shoal/blockdev"
)

func TestFrames(t *testing.T) {
	f := NewFrames(10 << 10)
	one, two := blockdev.Sum([]byte("one")), blockdev.Sum([]byte("two"))
	frame := bytes.Repeat([]byte("z"), 100)
	get := func(d blockdev.Digest) bool {
		e, ok := f.Get(t.Context(), d)
		if ok && (!bytes.Equal(e.Data, frame) || !e.Zstd || e.Length != 200) {
			t.Errorf("another frame than was kept: %+v", e)
		}
		return ok
	}

	kept := f.offer(one, frame, 200)
	if f.offer(one, frame, 200) != nil {
		t.Error("a second frame of the same chunk is kept")
	}
	f.settle(kept, true)
	f.settle(f.offer(two, frame, 200), false)
	if !get(one) || get(two) {
		t.Error("a right frame is not found, or a wrong one is")
	}
	f.settle(f.offer(two, frame, 200), true)
	if !get(two) {
		t.Error("a wrong frame keeps the right one out")
	}
	if f.offer(blockdev.Sum([]byte("three")), frame, len(frame)) != nil {
		t.Error("a frame is kept that is as long as its chunk")
	}
	for i := range 1000 {
		f.settle(f.offer(blockdev.Sum(fmt.Append(nil, i)), frame, 200), i%2 == 0)
	}
	if get(one) || f.size > f.limit || f.kept.Len() > 10<<10/100 {
		t.Errorf("it takes %d bytes for %d frames; the limit is %d", f.size, f.kept.Len(), f.limit)
	}

	none := NewFrames(0)
	none.settle(none.offer(one, frame, 200), true)
	if _, ok := none.Get(t.Context(), one); ok {
		t.Error("a nil Frames keeps something")
	}
}

// Who asks for a frame while its bytes are being looked at waits for the verdict.
func TestFramesWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, ok := range []bool{true, false} {
			f, d := NewFrames(1<<20), blockdev.Sum([]byte("one"))
			kept := f.offer(d, []byte("frame"), 200)
			got := make(chan bool)
			for range 2 {
				go func() {
					_, ok := f.Get(t.Context(), d)
					got <- ok
				}()
			}
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			if _, ok := f.Get(ended, d); ok {
				t.Error("a frame is given out before anybody has looked at it")
			}
			synctest.Wait()
			select {
			case <-got:
				t.Error("nobody has waited")
			default:
			}
			f.settle(kept, ok)
			for range 2 {
				if <-got != ok {
					t.Errorf("right: %v, and who has waited is told otherwise", ok)
				}
			}
		}
	})
}

// A client keeps the frames of the chunks that were right.
func TestClientFrames(t *testing.T) {
	data := [][]byte{bytes.Repeat([]byte("one"), 3000), bytes.Repeat([]byte("two"), 3000)}
	st, chunks := newStore(t, true, data...)
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st})
	f := NewFrames(1 << 20)
	c := newClient(t, h, Options{Intake: Intake{Frames: f}})
	if err := c.Fetch(t.Context(), request(blockdev.Prefetch, chunks[:1]), discard); err != nil {
		t.Fatal(err)
	}
	refuse := func(int, []byte) error { return fmt.Errorf("no: %w", blockdev.ErrCorrupt) }
	if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks[1:]), refuse); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Fatal(err)
	}
	e, ok := f.Get(t.Context(), chunks[0].Digest)
	if !ok || !bytes.Equal(e.Data, st.chunks[chunks[0].Digest].Data) {
		t.Error("the frame of a right chunk is not kept as it came")
	}
	if _, ok := f.Get(t.Context(), chunks[1].Digest); ok {
		t.Error("the frame of a chunk that was refused is kept")
	}
}
