package store

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
)

// indexed gives a layer an index that parses.
func indexed(t *testing.T, l fakeLayer) fakeLayer {
	t.Helper()
	ix := &blockdev.Index{DiffID: l.rec.DiffID}
	for _, c := range l.chunks {
		ix.Chunks = append(ix.Chunks, blockdev.Chunk{Offset: ix.DiffSize, Length: uint32(len(c)), Digest: blockdev.Sum(c)})
		ix.DiffSize += int64(len(c))
	}
	var err error
	if l.index, err = index.Encode(ix); err != nil {
		t.Fatal(err)
	}
	return l
}

func storeCheck(t *testing.T, s *Store, mark bool) *Health {
	t.Helper()
	h, err := s.Check(t.Context(), mark)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestCheck: damage to chunks, indexes and reference lists is found, and with mark
// the layers are forgotten, to be fetched again.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	a, b, c := indexed(t, newLayer(1, 300)), indexed(t, newLayer(2, 20)), indexed(t, newLayer(3, 20))
	for _, l := range []fakeLayer{a, b, c} {
		publish(t, s, l)
	}
	h := storeCheck(t, s, true)
	if len(h.Findings) != 0 || h.Chunks != 340 || h.Diffs != 3 || h.Layers != 3 {
		t.Fatalf("a sound store: %+v", h)
	}
	bad := blockdev.Sum(a.chunks[250])
	r, _, err := s.lookup(bad)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, s.packs.path(r.Pack), r.Offset+100)
	d, _, err := s.diffRecord(b.rec.DiffID)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, s.packs.path(d.Index.Pack), d.Index.Offset+5)
	h = storeCheck(t, s, false)
	if len(h.Findings) != 2 || h.Findings[0].Repaired != "" || !strings.Contains(h.Findings[1].Where, bad.String()) {
		t.Fatalf("two places are damaged: %+v", h.Findings)
	}
	check(t, s, c)
	if h = storeCheck(t, s, true); len(h.Findings) != 2 || h.Findings[0].Repaired == "" || h.Findings[1].Repaired == "" {
		t.Fatalf("with mark: %+v", h.Findings)
	}
	for _, l := range []fakeLayer{a, b} {
		if _, err := s.Layer(l.rec.Layer); !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("a damaged layer is handed out: %v", err)
		}
		publish(t, s, l)
		check(t, s, l)
	}
	if h = storeCheck(t, s, true); len(h.Findings) != 0 {
		t.Fatalf("fetched again: %+v", h.Findings)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Check(ctx, true); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	shut(t, s)
	checkAccounts(t, dir)
	if err := CheckIndex(dir); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "index.db"), bytes.Repeat([]byte("no database"), 3000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CheckIndex(dir); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("no database: %v", err)
	}
}

// TestCheckFlippedKey: a diff's record under a key in which a bit has flipped is removed,
// and the layer can be fetched again.
func TestCheckFlippedKey(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	l := indexed(t, newLayer(1, 30))
	publish(t, s, l)
	shut(t, s)
	db, err := bolt.Open(filepath.Join(dir, "index.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		b, key := tx.Bucket(bucketDiffs), l.rec.DiffID
		record := bytes.Clone(b.Get(key[:]))
		if err := b.Delete(key[:]); err != nil {
			return err
		}
		key[5] ^= 0x20
		return b.Put(key[:], record)
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Dir: dir})
	if h := storeCheck(t, s, false); len(h.Findings) == 0 {
		t.Error("nothing was found")
	}
	publish(t, s, l) // as when the layer is asked for
	if h := storeCheck(t, s, true); len(h.Findings) != 1 || h.Findings[0].Repaired == "" {
		t.Errorf("with mark: %+v", h.Findings)
	}
	if h := storeCheck(t, s, false); len(h.Findings) != 0 || h.Diffs != 1 || h.Chunks != 30 {
		t.Errorf("repaired: %+v", h)
	}
	check(t, s, l)
	shut(t, s)
	checkAccounts(t, dir)
}

// TestCheckWhileUsed: what is compressed and moved meanwhile is no damage.
func TestCheckWhileUsed(t *testing.T) {
	s := open(t, Config{Dir: t.TempDir(), Idle: 1})
	for seed := range uint64(4) {
		publish(t, s, indexed(t, newLayer(seed, 100)))
		if h := storeCheck(t, s, true); len(h.Findings) != 0 {
			t.Fatalf("a sound store: %+v", h.Findings)
		}
	}
}
