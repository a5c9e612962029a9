package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
)

func TestMain(m *testing.M) {
	if args := os.Getenv(childEnv); args != "" {
		childMain(args)
		return
	}
	goleak.VerifyTestMain(m)
}

// fakeLayer is a layer made of chunks; its index is some bytes.
type fakeLayer struct {
	rec    LayerRecord
	index  []byte
	chunks [][]byte
}

// newLayer makes n chunks from seed; half of each chunk compresses.
func newLayer(seed uint64, n int) fakeLayer {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	var l fakeLayer
	for i := range n {
		c := make([]byte, 16<<10+i*37%4096)
		fillRandom(r, c[:len(c)/2])
		l.chunks = append(l.chunks, c)
	}
	l.index = make([]byte, 3000)
	fillRandom(r, l.index)
	l.rec = LayerRecord{
		Layer: blockdev.Sum(fmt.Appendf(nil, "layer %d", seed)), Size: int64(n) * 8 << 10,
		DiffID: blockdev.Sum(fmt.Appendf(nil, "diff %d", seed)), Origins: []string{"registry.example"},
	}
	return l
}

func (l fakeLayer) digests() []blockdev.Digest {
	var ds []blockdev.Digest
	for _, c := range l.chunks {
		ds = append(ds, blockdev.Sum(c))
	}
	return ds
}

func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, s) })
	return s
}

func shut(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func fillRandom(r io.Reader, b []byte) {
	if _, err := io.ReadFull(r, b); err != nil {
		panic(err) // a random generator does not end
	}
}

func put(t testing.TB, s *Store, l fakeLayer) *Ingest {
	t.Helper()
	in, err := s.Begin(l.rec.Layer)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range l.chunks {
		if err := in.Put(t.Context(), blockdev.Sum(c), c); err != nil {
			t.Fatal(err)
		}
	}
	return in
}

func publish(t testing.TB, s *Store, l fakeLayer) {
	t.Helper()
	if err := put(t, s, l).Publish(t.Context(), l.rec, l.index, slices.Values(l.digests())); err != nil {
		t.Fatal(err)
	}
}

func raw(t testing.TB, c Chunk) []byte {
	t.Helper()
	if !c.Zstd {
		return c.Data
	}
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	b, err := d.DecodeAll(c.Data, nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// checkChunks reads every chunk of l and compares it.
func checkChunks(t testing.TB, s *Store, l fakeLayer) {
	t.Helper()
	for i, want := range l.chunks {
		c, err := s.Chunk(t.Context(), blockdev.Sum(want))
		if err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
		if got := raw(t, c); !bytes.Equal(got, want) || int(c.Length) != len(want) {
			t.Fatalf("chunk %d differs", i)
		}
	}
}

func check(t testing.TB, s *Store, l fakeLayer) {
	t.Helper()
	checkChunks(t, s, l)
	ix, err := s.Index(t.Context(), l.rec.DiffID)
	if err != nil || !bytes.Equal(ix, l.index) {
		t.Fatalf("index: %v", err)
	}
	r, err := s.Layer(l.rec.Layer)
	if err != nil || r.DiffID != l.rec.DiffID || r.Size != l.rec.Size {
		t.Fatalf("layer: %+v, %v", r, err)
	}
}

func checkGone(t testing.TB, s *Store, l fakeLayer) {
	t.Helper()
	for i, c := range l.chunks {
		if _, err := s.Chunk(t.Context(), blockdev.Sum(c)); !errors.Is(err, blockdev.ErrNotFound) {
			t.Fatalf("chunk %d: %v, want not found", i, err)
		}
	}
	if _, err := s.Index(t.Context(), l.rec.DiffID); !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatalf("index: %v, want not found", err)
	}
	if _, err := s.Layer(l.rec.Layer); !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatalf("layer: %v, want not found", err)
	}
}

// du is the disk space below dir, in bytes.
func du(t testing.TB, dir string) int64 {
	t.Helper()
	var n int64
	err := filepath.Walk(dir, func(_ string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().IsRegular() {
			n += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// checkAccounts opens index.db and proves references, live counts and packs
// against the diffs. The store must be closed.
func checkAccounts(t testing.TB, dir string) {
	t.Helper()
	s := open(t, Config{Dir: dir, Idle: -1})
	defer shut(t, s)
	want := make(map[blockdev.Digest]uint32)
	live := make(map[uint64]int64)
	var due int64
	for _, id := range s.catalogue.ids() {
		lists, err := s.refsOf(id)
		if err != nil || lists == nil {
			t.Fatalf("references of %s: %v", id, err)
		}
		for _, d := range slices.Concat(lists...) {
			want[d]++
		}
		r, _, _ := s.db.diff(id)
		live[r.Index.Pack]++
		for _, e := range r.lists() {
			live[e.Pack]++
		}
	}
	err := s.db.view(func(tx *bolt.Tx) error {
		if err := tx.Bucket(bucketChunks).ForEach(func(k, v []byte) error {
			d, _ := toDigest(k)
			r, err := decodeChunk(v)
			if err != nil || r.refs != want[d] || r.refs == 0 {
				t.Errorf("chunk %s has %d references, want %d (%v)", d, r.refs, want[d], err)
			}
			delete(want, d)
			live[r.Pack]++
			if r.flags&flagDue != 0 {
				due += int64(r.raw)
				v := tx.Bucket(bucketDue).Get(dueKey(r.extent))
				if !bytes.Equal(v[:min(len(v), len(d))], d[:]) || dueLength(v) != int64(r.raw) {
					t.Errorf("chunk %s is to be compressed, its entry says %x", d, v)
				}
			}
			return nil
		}); err != nil {
			return err
		}
		n := 0
		if err := tx.Bucket(bucketPacks).ForEach(func(k, v []byte) error {
			n++
			id := binary.BigEndian.Uint64(k)
			if got := int64(binary.LittleEndian.Uint64(v)); got != live[id] {
				t.Errorf("pack %d counts %d live extents, want %d", id, got, live[id])
			}
			return nil
		}); err != nil {
			return err
		}
		if n != len(live) {
			t.Errorf("%d packs known, want %d", n, len(live))
		}
		if k, _ := tx.Bucket(bucketUnpublished).Cursor().First(); k != nil {
			t.Errorf("references of pack %x are not published", k)
		}
		if k, _ := tx.Bucket(bucketOrphans).Cursor().First(); k != nil {
			t.Errorf("orphan %x left", k)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(want) > 0 {
		t.Errorf("%d chunks that diffs refer to are missing", len(want))
	}
	ids, _ := s.packs.list()
	if len(ids) != len(live) {
		t.Errorf("%d pack files, want %d", len(ids), len(live))
	}
	if n := s.Stats().DueBytes; n != due {
		t.Errorf("store says %d bytes are to be compressed, its records %d", n, due)
	}
	used, _ := s.space.numbers()
	if n := du(t, dir); used != n {
		t.Errorf("store says %d bytes used, disk says %d", used, n)
	}
}

func TestPublishReadRestart(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	l := newLayer(1, 100)
	in := put(t, s, l)
	checkChunks(t, s, l) // readable before the index is
	if _, err := s.Layer(l.rec.Layer); !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatalf("layer visible before publish: %v", err)
	}
	if err := in.Publish(t.Context(), l.rec, l.index, slices.Values(l.digests())); err != nil {
		t.Fatal(err)
	}
	check(t, s, l)
	if err := in.Put(t.Context(), blockdev.Sum([]byte("x")), []byte("x")); err == nil {
		t.Error("Put after Publish succeeded")
	}
	if err := s.AddOrigin(l.rec.Layer, "mirror.example"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Chunk(t.Context(), blockdev.Sum(l.chunks[0])); !errors.Is(err, ErrClosed) {
		t.Errorf("Chunk after Close: %v", err)
	}
	s = open(t, Config{Dir: dir})
	check(t, s, l)
	if r, _ := s.Layer(l.rec.Layer); len(r.Origins) != 2 {
		t.Errorf("origins after restart: %v", r.Origins)
	}
	shut(t, s)
	checkAccounts(t, dir)
}

func TestEachChunkOnce(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	a, b := newLayer(1, 200), newLayer(2, 10)
	b.chunks = append(b.chunks, a.chunks[:150]...)
	b.chunks = append(b.chunks, b.chunks[0], b.chunks[3]) // repeated within
	c := newLayer(3, 0)
	c.chunks = a.chunks[100:]
	// b and c are put while a is not published yet, and all publish in the end.
	inA, inB, inC := put(t, s, a), put(t, s, b), put(t, s, c)
	for _, x := range []struct {
		in *Ingest
		l  fakeLayer
	}{{inA, a}, {inC, c}, {inB, b}} {
		if err := x.in.Publish(t.Context(), x.l.rec, x.l.index, slices.Values(x.l.digests())); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []fakeLayer{a, b, c} {
		check(t, s, l)
	}
	if used, want := s.Stats().Used, int64(210*18<<10+400<<10); used > want {
		t.Errorf("%d bytes on disk, want at most %d: chunks are stored more than once", used, want)
	}
	// Publishing the same again changes nothing.
	publish(t, s, b)
	// The owner of shared chunks goes; the others keep them.
	if err := s.Remove(a.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	check(t, s, b)
	check(t, s, c)
	if err := s.Remove(c.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	check(t, s, b)
	shut(t, s)
	checkAccounts(t, dir)
	s = open(t, Config{Dir: dir})
	if err := s.Remove(b.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	for _, l := range []fakeLayer{a, b, c} {
		checkGone(t, s, l)
	}
	if use := s.Stats().Used - fileUse(dbPath(s.cfg.Dir)); use != 0 {
		t.Errorf("%d bytes left in an empty store", use)
	}
	shut(t, s)
	checkAccounts(t, dir)
}

func TestTwoLayersOneDiff(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	a := newLayer(1, 20)
	publish(t, s, a)
	b := a
	b.rec.Layer = blockdev.Sum([]byte("the same, compressed otherwise"))
	publish(t, s, b)
	check(t, s, a)
	check(t, s, b)
	if err := s.Remove(a.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	checkGone(t, s, a)
	checkGone(t, s, b)
	shut(t, s)
	checkAccounts(t, dir)
}

func TestEmptyLayer(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	l := newLayer(1, 0)
	publish(t, s, l)
	check(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}

func TestPublishNeedsEveryChunk(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	l := newLayer(1, 5)
	in := put(t, s, l)
	if err := in.Publish(t.Context(), l.rec, l.index, slices.Values(append(l.digests(), blockdev.Sum([]byte("never put"))))); err == nil {
		t.Fatal("published without a chunk")
	}
	checkGone(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}

func TestAbortAndCrash(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	keep, l := newLayer(1, 50), newLayer(2, 300)
	publish(t, s, keep)
	l.chunks = append(l.chunks, keep.chunks...)
	before := du(t, dir)
	put(t, s, l).Abort()
	checkGone(t, s, fakeLayer{rec: l.rec, chunks: l.chunks[:300]})
	check(t, s, keep)
	if after := du(t, dir); after > before {
		t.Errorf("aborted ingest left %d bytes", after-before)
	}
	// As after a crash: a pack that no transaction has named.
	if err := os.WriteFile(s.packs.path(77), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	shut(t, s)
	checkAccounts(t, dir)
	s = open(t, Config{Dir: dir})
	check(t, s, keep)
}
