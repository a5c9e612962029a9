package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

// inBatches is a store that commits so few chunks at a time.
func inBatches(dir string) Config { return Config{Dir: dir, Idle: -1, batch: 10} }

// overlapping are two layers with many batches each, that share some of them.
func overlapping() (a, b fakeLayer) {
	a, b = newLayer(1, 55), newLayer(2, 30)
	b.chunks = append(b.chunks, a.chunks[20:50]...)
	b.chunks = append(b.chunks, b.chunks[:5]...) // repeated, in another batch
	return a, b
}

func format(t *testing.T, s *Store) (v uint32) {
	t.Helper()
	if err := s.db.view(func(tx *bolt.Tx) error {
		v = binary.LittleEndian.Uint32(tx.Bucket(bucketMeta).Get(keyFormat))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestBatches: a layer of many batches is like another one, and neither its chunks in
// memory nor its transactions grow with it.
func TestBatches(t *testing.T) {
	dir := t.TempDir()
	s := open(t, inBatches(dir))
	small := newLayer(9, 8)
	publish(t, s, small)
	if v := format(t, s); v != firstFormat {
		t.Errorf("format %d, and there is nothing in batches", v)
	}
	a, b := overlapping()
	inA, inB := put(t, s, a), put(t, s, b)
	for _, in := range []*Ingest{inA, inB} {
		if n := len(in.chunks) + len(in.held); n >= 10 || len(in.lists) < 5 {
			t.Errorf("%d chunks in memory after %d batches", n, len(in.lists))
		}
	}
	checkChunks(t, s, a)
	for _, x := range []struct {
		in *Ingest
		l  fakeLayer
	}{{inA, a}, {inB, b}} {
		if err := x.in.Publish(t.Context(), x.l.rec, x.l.index, slices.Values(x.l.digests())); err != nil {
			t.Fatal(err)
		}
	}
	if v := format(t, s); v != formatVersion {
		t.Errorf("format %d, and earlier versions know no batches", v)
	}
	publish(t, s, a) // once more changes nothing
	shut(t, s)
	checkAccounts(t, dir)
	s = open(t, inBatches(dir))
	check(t, s, a)
	check(t, s, b)
	if h, err := s.Check(t.Context(), false); err != nil || h.Chunks != 8+55+30 {
		t.Errorf("%+v, %v", h, err)
	}
	if err := s.Remove(a.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	check(t, s, b)
	if err := s.Remove(b.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	check(t, s, small)
	checkGone(t, s, a)
	checkGone(t, s, b)
	shut(t, s)
	checkAccounts(t, dir)
}

// TestBatchesEndOnBoundary: nothing is left for the last batch.
func TestBatchesEndOnBoundary(t *testing.T) {
	dir := t.TempDir()
	s := open(t, inBatches(dir))
	l := newLayer(1, 30)
	publish(t, s, l)
	check(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
	s = open(t, inBatches(dir))
	if err := s.Remove(l.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	checkGone(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}

// TestBatchesUnpublished: what comes to no end leaves nothing, and takes nothing from
// others that count on it.
func TestBatchesUnpublished(t *testing.T) {
	for _, how := range []string{"abort", "crash", "crash while it is freed"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			cfg := inBatches(dir)
			s := open(t, cfg)
			a, b := overlapping()
			inA := put(t, s, a)
			publish(t, s, b) // counts on batches of a
			switch how {
			case "abort":
				inA.Abort()
			case "crash while it is freed":
				n := 0
				s.cfg.hook = func(point string) {
					if n++; point == "drop" && n == 3 {
						if err := s.db.Close(); err != nil {
							t.Error(err)
						}
					}
				}
				inA.Abort()
				if n != 3 {
					t.Fatalf("%d lists dropped", n)
				}
				shut(t, s)
				s = open(t, cfg)
			case "crash":
				if err := s.db.Close(); err != nil {
					t.Fatal(err)
				}
				shut(t, s)
				s = open(t, cfg)
			}
			check(t, s, b)
			checkGone(t, s, fakeLayer{rec: a.rec, chunks: append(a.chunks[:20:20], a.chunks[50:]...)})
			shut(t, s)
			checkAccounts(t, dir)
		})
	}
}

// TestRemoveInterrupted: a diff of many lists is gone as soon as it is removed, and a
// restart frees what was not freed yet.
func TestRemoveInterrupted(t *testing.T) {
	dir := t.TempDir()
	s := open(t, inBatches(dir))
	a, b := overlapping()
	publish(t, s, a)
	publish(t, s, b)
	n := 0
	s.cfg.hook = func(point string) {
		if n++; point == "drop" && n == 3 {
			if err := s.db.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	_ = s.Remove(a.rec.DiffID) // it crashed
	shut(t, s)
	s = open(t, inBatches(dir))
	check(t, s, b)
	checkGone(t, s, fakeLayer{rec: a.rec, chunks: append(a.chunks[:20:20], a.chunks[50:]...)})
	shut(t, s)
	checkAccounts(t, dir)
}

// TestDamagedBatch: a chunk that is found damaged before the layer is published is not
// published.
func TestDamagedBatch(t *testing.T) {
	dir := t.TempDir()
	s := open(t, inBatches(dir))
	l := newLayer(1, 35)
	in := put(t, s, l)
	d := blockdev.Sum(l.chunks[0])
	r, ok, err := s.db.chunk(d)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	flip(t, s.packs.path(r.Pack), r.Offset)
	if _, err := s.Chunk(t.Context(), d); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Fatal(err)
	}
	if err := in.Publish(t.Context(), l.rec, l.index, slices.Values(l.digests())); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("published: %v", err)
	}
	publish(t, s, l)
	check(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}

// TestBatchesNeedEveryChunk: as for small layers.
func TestBatchesNeedEveryChunk(t *testing.T) {
	dir := t.TempDir()
	s := open(t, inBatches(dir))
	l := newLayer(1, 35)
	in := put(t, s, l)
	if err := in.Publish(t.Context(), l.rec, l.index, slices.Values(append(l.digests(), blockdev.Sum([]byte("never put"))))); err == nil {
		t.Fatal("published without a chunk")
	}
	checkGone(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}

// TestLostKeyInBatches: the record of a chunk is gone, and the same diff comes again.
func TestLostKeyInBatches(t *testing.T) {
	dir := t.TempDir()
	s := open(t, inBatches(dir))
	l := newLayer(1, 35)
	publish(t, s, l)
	d := blockdev.Sum(l.chunks[7])
	if err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketChunks)
		v := bytes.Clone(b.Get(d[:]))
		if err := b.Delete(d[:]); err != nil {
			return err
		}
		d[0] ^= 1
		return b.Put(d[:], v)
	}); err != nil {
		t.Fatal(err)
	}
	publish(t, s, l)
	check(t, s, l)
	shut(t, s)
	s = open(t, inBatches(dir)) // counts again
	check(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}
