package supernode

import (
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// BenchmarkFetch is the embedded supernode's data path: stored chunks, raw.
func BenchmarkFetch(b *testing.B) {
	s := start(b)
	in, err := s.store.Begin(blockdev.Sum([]byte("bench")))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(in.Abort)
	ix, data := blockdevtest.Diff(1, 16<<20)
	for i := range data {
		data[i] &= 0x3f // so that zstd has something to do
	}
	for i, c := range ix.Chunks {
		raw := data[c.Offset:][:c.Length]
		ix.Chunks[i].Digest = blockdev.Sum(raw)
		if err := in.Put(b.Context(), ix.Chunks[i].Digest, raw); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Fetch(b.Context(), blockdev.Request{Chunks: ix.Chunks}, func(int, []byte) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFetchIndexes is a pull of an image of ten layers that is stored, by a
// peer whose access is known.
func BenchmarkFetchIndexes(b *testing.B) {
	f := registrytest.NewFake(b)
	var layers []registrytest.Layer
	for i := range 10 {
		layers = append(layers, registrytest.GzipLayer(b, "f", 100_000, uint64(i)))
	}
	f.Push(b, "app", "v1", layers...)
	s := start(b)
	req := request(f.Target, "app:v1", nobody)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.FetchIndexesFor(b.Context(), "p", req); err != nil {
			b.Fatal(err)
		}
	}
}
