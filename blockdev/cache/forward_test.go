package cache

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
)

func (r *rig) forward(prio blockdev.Priority, hops int, digests ...blockdev.Digest) *Forward {
	r.t.Helper()
	f, err := r.Forward(r.ix.DiffID, prio, hops, digests)
	if err != nil {
		r.t.Fatal(err)
	}
	return f
}

func alloc(n int) []byte { return make([]byte, n) }

// What another node asks for is fetched once, also if this node reads it at the
// same time, and is on disk afterwards.
func TestForward(t *testing.T) {
	r := newRig(t, 1<<20, func(c *Config) { c.ReadAhead = -1 })
	var asked, hops atomic.Int64
	gate := make(chan struct{})
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		asked.Add(int64(len(req.Chunks)))
		hops.Store(int64(req.Hops))
		<-gate
		return r.mem.Fetch(ctx, req, deliver)
	})
	var digests []blockdev.Digest
	for _, c := range r.ix.Chunks {
		digests = append(digests, c.Digest)
	}
	none := blockdev.Sum([]byte("of no diff"))
	f := r.forward(blockdev.Prefetch, 3, append(digests, none)...)
	if f.Missing() != len(digests) || !f.Absent(0) || f.Absent(len(digests)) {
		t.Errorf("%d missing", f.Missing())
	}
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	if err := f.Start(); err != nil { // asks for nothing twice
		t.Fatal(err)
	}
	read := make(chan error)
	go func() {
		_, err := r.d.ReadAt(context.Background(), make([]byte, 1000), 0)
		read <- err
	}()
	close(gate)
	for i, c := range r.ix.Chunks {
		f.Wait(t.Context(), i)
		b, err := f.Chunk(t.Context(), i, alloc)
		if err != nil || !bytes.Equal(b, r.data[c.Offset:][:c.Length]) {
			t.Fatalf("chunk %d: %v", i, err)
		}
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
	if _, err := f.Chunk(t.Context(), len(digests), alloc); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("a chunk of no diff: %v", err)
	}
	if f.Missing() != 0 || r.d.Stat().ChunksPresent != len(digests) {
		t.Error("what was forwarded is not on disk")
	}
	// The read may have had its one chunk asked for again, with demand priority.
	if n := asked.Load(); n > int64(len(digests))+1 || hops.Load() != 3 && n == int64(len(digests)) {
		t.Errorf("%d chunks were asked for, with %d hops", n, hops.Load())
	}
	if _, err := r.Forward(none, blockdev.Demand, 0, digests); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("a diff that is not here: %v", err)
	}
}

// A chunk that this disk has spoiled is not passed on, but fetched again.
func TestForwardChecksTheDisk(t *testing.T) {
	r := newRig(t, 1<<20, func(c *Config) { c.ReadAhead = -1 })
	f := r.forward(blockdev.Demand, 1, r.ix.Chunks[2].Digest)
	want, err := f.Chunk(t.Context(), 0, alloc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.d.data.WriteAt([]byte("spoiled"), r.ix.Chunks[2].Offset); err != nil {
		t.Fatal(err)
	}
	got, err := f.Chunk(t.Context(), 0, alloc)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%v; the bytes are right: %v", err, bytes.Equal(got, want))
	}
	if r.Stats().DamagedChunks != 1 {
		t.Error("the damage was not counted")
	}
}

// The source fails: so does who waits for it, and nobody waits for ever.
func TestForwardFails(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	r.source(func(context.Context, blockdev.Request, blockdev.Deliver) error { return blockdev.ErrNotFound })
	f := r.forward(blockdev.Prefetch, 1, r.ix.Chunks[0].Digest)
	f.Wait(t.Context(), 0)
	if _, err := f.Chunk(t.Context(), 0, alloc); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("%v", err)
	}
	r.source(func(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
		<-ctx.Done()
		return ctx.Err()
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the peer is gone")
	cancel(gone)
	if _, err := f.Chunk(ctx, 0, alloc); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
}

// Pieces of the header stream are given as far as they are here, and are not fetched
// for others. The index is given as it came.
func TestForwardForAnotherProof(t *testing.T) {
	r, l := newProofRig(t, nil)
	pieces := make([]blockdev.Digest, len(l.Index.Headers))
	for i, p := range l.Index.Headers {
		pieces[i] = p.Digest
	}
	f := r.forward(blockdev.Prefetch, 0, pieces...)
	if _, err := f.Chunk(t.Context(), 0, alloc); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("a piece that is not here: %v", err)
	}
	r.prove()
	for i, d := range pieces {
		b, err := f.Chunk(t.Context(), i, alloc)
		if err != nil || blockdev.Sum(b) != d {
			t.Errorf("piece %d: %d bytes, %v", i, len(b), err)
		}
	}
	enc, err := r.EncodedIndex(r.ix.DiffID)
	if err != nil {
		t.Fatal(err)
	}
	if ix, err := index.Decode(enc); err != nil || ix.DiffID != r.ix.DiffID {
		t.Errorf("index: %v", err)
	}
	if _, err := r.EncodedIndex(blockdev.Sum(nil)); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("the index of a diff that is not here: %v", err)
	}
}
