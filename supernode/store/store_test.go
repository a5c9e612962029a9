package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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
		r.Read(c[:len(c)/2])
		l.chunks = append(l.chunks, c)
	}
	l.index = make([]byte, 3000)
	r.Read(l.index)
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
	t.Cleanup(func() { s.Close() })
	return s
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
	if err := put(t, s, l).Publish(t.Context(), l.rec, l.index, l.digests()); err != nil {
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
	s := open(t, Config{Dir: dir})
	defer s.Close()
	want := make(map[blockdev.Digest]uint32)
	live := make(map[uint64]int64)
	for _, id := range s.diffIDs() {
		refs, err := s.refsOf(id)
		if err != nil || refs == nil {
			t.Fatalf("references of %s: %v", id, err)
		}
		for _, d := range refs {
			want[d]++
		}
		r, _, _ := s.diffRecord(id)
		live[r.Index.Pack]++
		live[r.Refs.Pack]++
	}
	err := s.view(func(tx *bolt.Tx) error {
		if err := tx.Bucket(bucketChunks).ForEach(func(k, v []byte) error {
			d, _ := toDigest(k)
			r, err := decodeChunk(v)
			if err != nil || r.refs != want[d] || r.refs == 0 {
				t.Errorf("chunk %s has %d references, want %d (%v)", d, r.refs, want[d], err)
			}
			delete(want, d)
			live[r.Pack]++
			return nil
		}); err != nil {
			return err
		}
		n := 0
		if err := tx.Bucket(bucketPacks).ForEach(func(k, v []byte) error {
			n++
			var id uint64
			fmt.Sscanf(fmt.Sprintf("%x", k), "%x", &id)
			if got := int64(v[0]) | int64(v[1])<<8 | int64(v[2])<<16; got != live[id] {
				t.Errorf("pack %d counts %d live extents, want %d", id, got, live[id])
			}
			return nil
		}); err != nil {
			return err
		}
		if n != len(live) {
			t.Errorf("%d packs known, want %d", n, len(live))
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
	s.mu.Lock()
	used := s.used
	s.mu.Unlock()
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
	if err := in.Publish(t.Context(), l.rec, l.index, l.digests()); err != nil {
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
	s.Close()
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
		if err := x.in.Publish(t.Context(), x.l.rec, x.l.index, x.l.digests()); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []fakeLayer{a, b, c} {
		check(t, s, l)
	}
	if used, want := s.Stats().Used, int64(210*10<<10+400<<10); used > want {
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
	s.Close()
	checkAccounts(t, dir)
	s = open(t, Config{Dir: dir})
	if err := s.Remove(b.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	for _, l := range []fakeLayer{a, b, c} {
		checkGone(t, s, l)
	}
	if use := s.Stats().Used - fileUse(s.dbPath()); use != 0 {
		t.Errorf("%d bytes left in an empty store", use)
	}
	s.Close()
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
	s.Close()
	checkAccounts(t, dir)
}

func TestEmptyLayer(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	l := newLayer(1, 0)
	publish(t, s, l)
	check(t, s, l)
	s.Close()
	checkAccounts(t, dir)
}

func TestPublishNeedsEveryChunk(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	l := newLayer(1, 5)
	in := put(t, s, l)
	if err := in.Publish(t.Context(), l.rec, l.index, append(l.digests(), blockdev.Sum([]byte("never put")))); err == nil {
		t.Fatal("published without a chunk")
	}
	checkGone(t, s, l)
	s.Close()
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
	s.Close()
	checkAccounts(t, dir)
	s = open(t, Config{Dir: dir})
	check(t, s, keep)
}

func TestQuotaHolds(t *testing.T) {
	dir := t.TempDir()
	const quota = 4 << 20
	s := open(t, Config{Dir: dir, Quota: quota})
	first := newLayer(0, 60)
	publish(t, s, first)
	defer s.Pin(first.rec.DiffID)()
	for i := uint64(1); i < 30; i++ {
		l := newLayer(i, 60)
		publish(t, s, l)
		check(t, s, l)
		if n := du(t, dir); n > quota {
			t.Fatalf("after layer %d: %d bytes on disk, quota %d", i, n, quota)
		}
		check(t, s, first) // pinned
	}
	if st := s.Stats(); st.Evicted == 0 || st.Used > quota {
		t.Errorf("stats %+v", st)
	}
	checkGone(t, s, newLayer(1, 60))
	// More than the quota: refused, and says what to do.
	big := newLayer(99, 600)
	in, err := s.Begin(big.rec.Layer)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range big.chunks {
		if err = in.Put(t.Context(), blockdev.Sum(c), c); err != nil {
			break
		}
	}
	if !errors.Is(err, blockdev.ErrNoSpace) || !bytes.Contains([]byte(err.Error()), []byte("store.quota")) {
		t.Fatalf("Put beyond the quota: %v", err)
	}
	if err := in.Publish(t.Context(), big.rec, big.index, nil); err == nil {
		t.Error("published after a failed Put")
	}
	check(t, s, first)
	publish(t, s, newLayer(50, 60))
	s.Close()
	checkAccounts(t, dir)
	// A smaller quota holds from the start.
	s = open(t, Config{Dir: dir, Quota: 1 << 20})
	if n := du(t, dir); n > 1<<20 {
		t.Errorf("%d bytes on disk after the quota was lowered to 1 MiB", n)
	}
}

func TestEvictsLeastRecentlyUsed(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	var ls []fakeLayer
	for i := range uint64(3) {
		ls = append(ls, newLayer(i, 10))
		publish(t, s, ls[i])
	}
	if !s.Touch(ls[0].rec.DiffID) {
		t.Fatal("Touch")
	}
	for _, want := range []int{1, 2, 0} {
		if ok, err := s.evictOne(); !ok || err != nil {
			t.Fatal(ok, err)
		}
		checkGone(t, s, ls[want])
	}
	if ok, err := s.evictOne(); ok || err != nil {
		t.Fatalf("evicted from an empty store: %v %v", ok, err)
	}
}

// An eviction while an ingest counts on a chunk of the evicted diff.
func TestIngestHoldsChunks(t *testing.T) {
	for _, how := range []string{"publish", "abort", "crash"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, Config{Dir: dir})
			a, b := newLayer(1, 50), newLayer(2, 10)
			b.chunks = append(b.chunks, a.chunks[:20]...)
			publish(t, s, a)
			in := put(t, s, b)
			if err := s.Remove(a.rec.DiffID); err != nil {
				t.Fatal(err)
			}
			checkGone(t, s, fakeLayer{rec: a.rec, chunks: a.chunks[20:]})
			checkChunks(t, s, b)
			switch how {
			case "publish":
				if err := in.Publish(t.Context(), b.rec, b.index, b.digests()); err != nil {
					t.Fatal(err)
				}
				check(t, s, b)
			case "abort":
				in.Abort()
				checkGone(t, s, b)
			case "crash":
				s.db.Close() // nothing more reaches the disk
				s.Close()
				s = open(t, Config{Dir: dir})
				checkGone(t, s, b)
			}
			s.Close()
			checkAccounts(t, dir)
		})
	}
}

func TestDamageOnDisk(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	a, b, c := newLayer(1, 20), newLayer(2, 20), newLayer(3, 20)
	b.chunks = append(b.chunks, a.chunks[7])
	publish(t, s, a)
	publish(t, s, b)
	publish(t, s, c)
	bad := blockdev.Sum(a.chunks[7])
	r, _, err := s.lookup(bad)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, s.packs.path(r.Pack), r.Offset+100)
	if _, err := s.Chunk(t.Context(), bad); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Fatalf("damaged chunk: %v", err)
	}
	for _, l := range []fakeLayer{a, b} {
		if _, err := s.Layer(l.rec.Layer); !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("layer with a damaged chunk: %v", err)
		}
	}
	check(t, s, c)
	if s.Has(bad) {
		t.Error("Has says yes to a damaged chunk")
	}
	// Fetched again, it heals for both.
	publish(t, s, a)
	check(t, s, a)
	checkChunks(t, s, b)

	// An index.
	d, _, _ := s.diffRecord(c.rec.DiffID)
	flip(t, s.packs.path(d.Index.Pack), d.Index.Offset+5)
	if _, err := s.Index(t.Context(), c.rec.DiffID); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Fatalf("damaged index: %v", err)
	}
	if _, err := s.Layer(c.rec.Layer); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("layer with a damaged index: %v", err)
	}
	publish(t, s, c)
	check(t, s, c)
	if s.Stats().Damaged == 0 {
		t.Error("damage not counted")
	}
	s.Close()
	checkAccounts(t, dir)
}

// Damage to what reference counting stands on: counted again at the next start.
func TestRecount(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	a, b := newLayer(1, 20), newLayer(2, 20)
	b.chunks = append(b.chunks, a.chunks[:5]...)
	publish(t, s, a)
	publish(t, s, b)
	d, _, _ := s.diffRecord(a.rec.DiffID)
	flip(t, s.packs.path(d.Refs.Pack), d.Refs.Offset)
	if err := s.Remove(a.rec.DiffID); err != nil {
		t.Fatal(err)
	}
	// And a chunk record.
	victim := blockdev.Sum(b.chunks[10])
	err := s.update(func(c *change) error {
		return c.tx.Bucket(bucketChunks).Put(victim[:], make([]byte, chunkRecordLen))
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Chunk(t.Context(), victim); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Fatalf("chunk with a damaged record: %v", err)
	}
	publish(t, s, b)
	check(t, s, b)
	s.Close()
	s = open(t, Config{Dir: dir})
	check(t, s, b)
	checkGone(t, s, fakeLayer{rec: a.rec, chunks: a.chunks[5:]})
	s.Close()
	checkAccounts(t, dir)
}

func flip(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedDatabase(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	l := newLayer(1, 5)
	publish(t, s, l)
	s.Close()
	if err := os.WriteFile(filepath.Join(dir, "index.db"), bytes.Repeat([]byte("no database"), 3000), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Dir: dir})
	checkGone(t, s, l)
	publish(t, s, l)
	check(t, s, l)
	s.Close()
	checkAccounts(t, dir)
}

func TestOneProcess(t *testing.T) {
	dir := t.TempDir()
	open(t, Config{Dir: dir})
	if _, err := Open(Config{Dir: dir}); err == nil {
		t.Fatal("opened twice")
	}
}

// Readers, ingests and evictions at once: every read is right or "not found".
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir, Quota: 3 << 20})
	shared := newLayer(1000, 20)
	var ls []fakeLayer
	for i := range uint64(8) {
		l := newLayer(i, 40)
		l.chunks = append(l.chunks, shared.chunks...)
		ls = append(ls, l)
	}
	ctx, stop := context.WithCancel(t.Context())
	var readers, writers sync.WaitGroup
	var hits atomic.Int64
	for w := range 4 {
		readers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1))
			for ctx.Err() == nil {
				l := ls[rnd.IntN(len(ls))]
				c := l.chunks[rnd.IntN(len(l.chunks))]
				got, err := s.Chunk(context.Background(), blockdev.Sum(c))
				switch {
				case errors.Is(err, blockdev.ErrNotFound):
				case err != nil:
					t.Error(err)
					return
				case blockdev.Sum(raw(t, got)) != blockdev.Sum(c):
					t.Error("wrong bytes")
					return
				default:
					hits.Add(1)
				}
				if _, err := s.Index(context.Background(), l.rec.DiffID); err != nil && !errors.Is(err, blockdev.ErrNotFound) {
					t.Error(err)
					return
				}
			}
		})
	}
	for w := range 3 {
		writers.Go(func() {
			for i := range 20 {
				l := ls[(i*3+w)%len(ls)]
				in, err := s.Begin(l.rec.Layer)
				if err != nil {
					t.Error(err)
					return
				}
				for _, c := range l.chunks {
					if err = in.Put(context.Background(), blockdev.Sum(c), c); err != nil {
						break
					}
				}
				if err == nil && i%5 == 4 {
					in.Abort()
					continue
				}
				if err == nil {
					err = in.Publish(context.Background(), l.rec, l.index, l.digests())
				}
				in.Abort()
				if err != nil && !errors.Is(err, blockdev.ErrNoSpace) {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	stop()
	readers.Wait()
	if hits.Load() == 0 || s.Stats().Evicted == 0 {
		t.Errorf("%d hits, %+v: the test tested nothing", hits.Load(), s.Stats())
	}
	if n := du(t, dir); n > 3<<20 {
		t.Errorf("%d bytes on disk, quota 3 MiB", n)
	}
	s.Close()
	checkAccounts(t, dir)
}

func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, Config{Dir: dir, Quota: 1 << 40})
	defer s.Close()
	a := newLayer(1, 100)
	publish(t, s, a)
	defer s.Pin(a.rec.DiffID)()
	// Somebody else takes the rest of the disk.
	if err := os.WriteFile(filepath.Join(dir, "other"), make([]byte, 5<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	big := newLayer(2, 600)
	in, err := s.Begin(big.rec.Layer)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range big.chunks {
		if err = in.Put(t.Context(), blockdev.Sum(c), c); err != nil {
			break
		}
	}
	if !errors.Is(err, blockdev.ErrNoSpace) {
		t.Fatalf("Put on a full disk: %v", err)
	}
	in.Abort()
	checkGone(t, s, big)
	check(t, s, a)
	if err := os.Remove(filepath.Join(dir, "other")); err != nil {
		t.Fatal(err)
	}
	l := newLayer(3, 50)
	publish(t, s, l)
	check(t, s, l)
}
