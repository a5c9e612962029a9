package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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
	r, _, err := s.db.chunk(bad)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, s.packs.path(r.Pack), r.Offset+100)
	d, _, err := s.db.diff(b.rec.DiffID)
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

// TestCheckRecords: a record whose key or value has flipped is found, repaired once, and
// the layers can be fetched again, with a check before that or without one.
func TestCheckRecords(t *testing.T) {
	for _, c := range []struct {
		name   string
		bucket []byte
		key    func(l fakeLayer) blockdev.Digest
		flip   func(key, record []byte)
	}{
		{"key of a diff", bucketDiffs, diffKey, func(key, _ []byte) { key[5] ^= 0x20 }},
		{"key of a chunk", bucketChunks, chunkKey, func(key, _ []byte) { key[5] ^= 0x20 }},
		{"record of a chunk", bucketChunks, chunkKey, func(_, record []byte) { record[5] ^= 0x20 }},
	} {
		for _, checked := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, checked %v", c.name, checked), func(t *testing.T) {
				dir := t.TempDir()
				s := open(t, Config{Dir: dir})
				l, other := indexed(t, newLayer(1, 30)), newLayer(2, 20)
				other.chunks = append(other.chunks, l.chunks[7])
				other = indexed(t, other)
				publish(t, s, l)
				publish(t, s, other)
				shut(t, s)
				changeRecord(t, dir, c.bucket, c.key(l), c.flip)
				s = open(t, Config{Dir: dir})
				if h := storeCheck(t, s, false); len(h.Findings) == 0 {
					t.Error("nothing was found")
				}
				if checked {
					for _, f := range storeCheck(t, s, true).Findings {
						if f.Repaired == "" {
							t.Errorf("with mark: %+v", f)
						}
					}
					if h := storeCheck(t, s, false); len(h.Findings) != 0 {
						t.Errorf("repaired: %+v", h)
					}
					shut(t, s)
					s = open(t, Config{Dir: dir})
				}
				publish(t, s, l) // as when the layer is asked for
				publish(t, s, other)
				shut(t, s)
				s = open(t, Config{Dir: dir})
				storeCheck(t, s, true) // a diff under a flipped key is in nobody's way until then
				if h := storeCheck(t, s, false); len(h.Findings) != 0 || h.Diffs != 2 || h.Chunks != 50 {
					t.Errorf("at last: %+v", h)
				}
				check(t, s, l)
				check(t, s, other)
				shut(t, s)
				checkAccounts(t, dir)
			})
		}
	}
}

func diffKey(l fakeLayer) blockdev.Digest { return l.rec.DiffID }

func chunkKey(l fakeLayer) blockdev.Digest { return blockdev.Sum(l.chunks[7]) }

// changeRecord changes one record of a store's index.db.
func changeRecord(t *testing.T, dir string, bucket []byte, key blockdev.Digest, change func(key, record []byte)) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(dir, "index.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucket)
		record := bytes.Clone(b.Get(key[:]))
		if err := b.Delete(key[:]); err != nil {
			return err
		}
		change(key[:], record)
		return b.Put(key[:], record)
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// FuzzFlip flips a bit in a file of a store: a check repairs it, the next one finds
// nothing, and layers that are fetched again are right.
func FuzzFlip(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		f.Add(rng.IntN(4) == 0, rng.Uint32(), byte(rng.IntN(8)))
	}
	f.Fuzz(func(t *testing.T, pack bool, at uint32, bit byte) {
		dir := t.TempDir()
		a, b := indexed(t, newLayer(1, 30)), newLayer(2, 20)
		b.chunks = append(b.chunks, a.chunks[7])
		b = indexed(t, b)
		s := open(t, Config{Dir: dir, Idle: -1})
		publish(t, s, a)
		publish(t, s, b)
		shut(t, s)
		path := dbPath(s.cfg.Dir)
		if pack {
			path = s.packs.path(1)
		}
		flipBit(t, path, at, bit)

		if err := CheckIndex(dir); err != nil && !errors.Is(err, blockdev.ErrCorrupt) {
			t.Fatal(err)
		}
		s, err := Open(Config{Dir: dir, Idle: -1, Thorough: true}) // as after a kill, and as shoal check
		if errors.Is(err, blockdev.ErrUnsupported) {
			return // the flip is in the format's number
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range storeCheck(t, s, true).Findings {
			if f.Repaired == "" {
				t.Errorf("not repaired: %+v", f)
			}
		}
		if h := storeCheck(t, s, false); len(h.Findings) != 0 {
			t.Errorf("after the repair: %+v", h.Findings)
		}
		shut(t, s)
		s = open(t, Config{Dir: dir, Idle: -1})
		publish(t, s, a)
		publish(t, s, b)
		check(t, s, a)
		check(t, s, b)
		if h := storeCheck(t, s, false); len(h.Findings) != 0 {
			t.Errorf("fetched again: %+v", h.Findings)
		}
		shut(t, s)
	})
}

// flipBit flips a bit of one of the bytes that are not zero: most of a database is empty.
func flipBit(t *testing.T, path string, at uint32, bit byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var used []int
	for i, b := range data {
		if b != 0 {
			used = append(used, i)
		}
	}
	data[used[int(at)%len(used)]] ^= 1 << (bit % 8)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
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
