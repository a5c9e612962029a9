package store

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

func TestDamageOnDisk(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	a, b, c := newLayer(1, 20), newLayer(2, 20), newLayer(3, 20)
	b.chunks = append(b.chunks, a.chunks[7])
	publish(t, s, a)
	publish(t, s, b)
	publish(t, s, c)
	bad := blockdev.Sum(a.chunks[7])
	r, _, err := s.db.chunk(bad)
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
	if _, err := s.Chunk(t.Context(), bad); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("a chunk that is known to be damaged: %v", err)
	}
	// Fetched again, it heals for both.
	publish(t, s, a)
	check(t, s, a)
	checkChunks(t, s, b)

	// An index.
	d, _, _ := s.db.diff(c.rec.DiffID)
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
	shut(t, s)
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
	d, _, _ := s.db.diff(a.rec.DiffID)
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
	shut(t, s)
	s = open(t, Config{Dir: dir})
	check(t, s, b)
	checkGone(t, s, fakeLayer{rec: a.rec, chunks: a.chunks[5:]})
	shut(t, s)
	checkAccounts(t, dir)
}

// A lost chunk lies nowhere: to mark it again touches nothing of who lies at the
// beginning of the first pack.
func TestLostTwice(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir(), Idle: -1})
	defer shut(t, s)
	l := newLayer(1, 20)
	publish(t, s, l)
	bad := blockdev.Sum(l.chunks[7])
	err := s.update(func(c *change) error {
		return c.tx.Bucket(bucketChunks).Put(bad[:], make([]byte, chunkRecordLen))
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s.damaged(map[blockdev.Digest]extent{bad: {}})
		err := s.db.view(func(tx *bolt.Tx) error {
			for i, b := range l.chunks {
				d := blockdev.Sum(b)
				r, err := decodeChunk(tx.Bucket(bucketChunks).Get(d[:]))
				if err != nil || r.lost() != (i == 7) {
					t.Errorf("chunk %d: %+v, %v", i, r, err)
				}
				if !r.lost() && tx.Bucket(bucketDue).Get(dueKey(r.extent)) == nil {
					t.Errorf("chunk %d is not to be compressed any more", i)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
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
	shut(t, s)
	if err := os.WriteFile(filepath.Join(dir, "index.db"), bytes.Repeat([]byte("no database"), 3000), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Dir: dir})
	checkGone(t, s, l)
	publish(t, s, l)
	check(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}

func TestOneProcess(t *testing.T) {
	dir := t.TempDir()
	open(t, Config{Dir: dir})
	if _, err := Open(Config{Dir: dir}); err == nil {
		t.Fatal("opened twice")
	}
}
