package store

import (
	"slices"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// benchLayer is a layer of some 1,000 chunks of 64 KiB, with their digests.
func benchLayer(seed uint64) (fakeLayer, []blockdev.Digest) {
	l := newLayer(seed, 1)
	l.chunks = nil
	for i := range 64 {
		part := newLayer(seed*1000+uint64(i), 16)
		for j := range part.chunks {
			l.chunks = append(l.chunks, slices.Concat(part.chunks[j], make([]byte, 64<<10-len(part.chunks[j]))))
		}
	}
	return l, l.digests()
}

// BenchmarkIngest is what the store does for a layer: its chunks, none of them known, and
// the publishing. Each layer is removed again.
func BenchmarkIngest(b *testing.B) {
	s := open(b, Config{Dir: b.TempDir(), Idle: -1})
	l, digests := benchLayer(1)
	b.SetBytes(int64(len(l.chunks) * 64 << 10))
	b.ReportAllocs()
	for b.Loop() {
		in, err := s.Begin(l.rec.Layer)
		if err != nil {
			b.Fatal(err)
		}
		for i, c := range l.chunks {
			if err := in.Put(b.Context(), digests[i], c); err != nil {
				b.Fatal(err)
			}
		}
		if err := in.Publish(b.Context(), l.rec, l.index, slices.Values(digests)); err != nil {
			b.Fatal(err)
		}
		if err := s.Remove(l.rec.DiffID); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPutKnown is a chunk that the store has already.
func BenchmarkPutKnown(b *testing.B) {
	s := open(b, Config{Dir: b.TempDir(), Idle: -1})
	l, digests := benchLayer(1)
	publish(b, s, l)
	in, err := s.Begin(blockdev.Sum([]byte("another")))
	if err != nil {
		b.Fatal(err)
	}
	defer in.Abort()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if i%len(digests) == 0 && i > 0 {
			in.Abort()
			if in, err = s.Begin(blockdev.Sum([]byte("another"))); err != nil {
				b.Fatal(err)
			}
		}
		if err := in.Put(b.Context(), digests[i%len(digests)], l.chunks[i%len(digests)]); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkChunk is what nodes ask for, by as many as there are processors.
func BenchmarkChunk(b *testing.B) {
	s := open(b, Config{Dir: b.TempDir(), Idle: -1})
	l, digests := benchLayer(1)
	publish(b, s, l)
	b.SetBytes(64 << 10)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if _, err := s.Chunk(b.Context(), digests[i%len(digests)]); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
