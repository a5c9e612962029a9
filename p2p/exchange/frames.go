package exchange

import (
	"bytes"
	"context"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/lru"
)

// Frames keeps chunks as they came, compressed, for a while, so that a node can
// pass them on as they are: what it has on disk is not compressed, two or three
// times as much to send, and must be read and hashed first. A peer that asks a node for a chunk of
// an image that all of them fetch asks about when the node gets it itself, so a
// few megabytes catch nearly all. The oldest go first.
//
// A frame is given out only after the taker of the chunk has said that its bytes
// are right. Frames may be used from several goroutines; a nil one keeps nothing.
type Frames struct {
	mu    sync.Mutex
	limit int64 // bytes
	size  int64 // of what is kept
	kept  *lru.Map[blockdev.Digest, *frame]
}

// frame is the one zstd frame of a chunk.
type frame struct {
	digest blockdev.Digest
	data   []byte
	length uint32 // of the chunk before compression

	// Under Frames.mu:
	state frameState
	judge chan struct{} // closed when the state is known; nil: nobody waits for it
}

type frameState uint8

const (
	unjudged frameState = iota
	right
	wrong
)

// NewFrames returns a Frames of at most limit bytes; nil if that is 0.
func NewFrames(limit int64) *Frames {
	if limit <= 0 {
		return nil
	}
	f := &Frames{limit: limit}
	f.kept = lru.Unbounded(func(_ blockdev.Digest, fr *frame) { f.size -= fr.bytes() })
	return f
}

// offer keeps a copy of a chunk's frame, of which nobody knows yet whether it is
// right: settle says so. It returns nil if there is nothing to settle.
func (f *Frames) offer(d blockdev.Digest, data []byte, length int) *frame {
	if f == nil || len(data) >= length {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.kept.Contains(d) {
		return nil
	}
	fr := &frame{digest: d, data: bytes.Clone(data), length: uint32(length)}
	f.kept.Add(d, fr)
	f.size += fr.bytes()
	for f.size > f.limit {
		f.kept.RemoveOldest()
	}
	return fr
}

// bytes is about what the frame takes of memory.
func (f *frame) bytes() int64 { return int64(len(f.data)) + 256 }

// settle says whether the bytes of a frame that offer has returned are right.
func (f *Frames) settle(fr *frame, ok bool) {
	if fr == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	fr.state = right
	if !ok {
		fr.state = wrong
		if now, _ := f.kept.Peek(fr.digest); now == fr {
			f.kept.Remove(fr.digest)
		}
	}
	if fr.judge != nil {
		close(fr.judge)
	}
}

// Get returns a chunk's frame, if it is here and right. It waits while a goroutine is
// looking at its bytes, which takes no longer than to write them to disk.
func (f *Frames) Get(ctx context.Context, d blockdev.Digest) (Encoded, bool) {
	if f == nil {
		return Encoded{}, false
	}
	f.mu.Lock()
	fr, _ := f.kept.Peek(d) // the oldest go first, however often they are asked for
	if fr != nil && fr.state == unjudged {
		if fr.judge == nil {
			fr.judge = make(chan struct{})
		}
		judge := fr.judge
		f.mu.Unlock()
		select {
		case <-judge:
		case <-ctx.Done():
			return Encoded{}, false
		}
		f.mu.Lock()
	}
	defer f.mu.Unlock()
	if fr == nil || fr.state != right {
		return Encoded{}, false
	}
	return Encoded{Data: fr.data, Zstd: true, Length: fr.length}, true
}
