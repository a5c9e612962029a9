package integration

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/integration/report"
)

// TestDrillBigStore: a supernode with a large store serves seconds after it was started,
// if it was stopped in good order. The store is made up: an index.db with the records of a
// TB of chunks (in make test, a GB), and packs of that length that are all hole.
func TestDrillBigStore(t *testing.T) {
	ctx := t.Context()
	size := int64(1 << 30)
	if isDrill() {
		size = 1 << 40
	}
	l := newLab(t)
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	noError(t, super.Stop())
	layers := makeStore(t, filepath.Join(l.Path("super"), "store"), size)
	start := func() float64 {
		noError(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0o200))
		began := time.Now()
		super = must(l.RestartSupernode(ctx, super))(t)
		took := time.Since(began).Seconds()
		if n := must(super.Metric(ctx, "shoal_supernode_store_layers"))(t); int(n) != layers {
			t.Fatalf("the supernode has %.0f layers, and %d were stored", n, layers)
		}
		return took
	}
	first := start()
	noError(t, super.Stop())
	second := start() // after its own end
	name := fmt.Sprintf("start of a supernode with %d GB of records after a clean end", size>>30)
	figure(t, name, "s", report.AtMost, 5, first, second)
	noError(t, super.Stop())
}

// packBytes is how long the packs of makeStore are, one for each layer.
const packBytes = 64 << 20

// makeStore writes the index.db and the packs of a store (doc.go of package store) and
// returns how many layers it has.
func makeStore(t *testing.T, dir string, size int64) (layers int) {
	t.Helper()
	noError(t, os.RemoveAll(dir))
	noError(t, os.MkdirAll(filepath.Join(dir, "packs"), 0o700))
	// With bbolt's defaults it keeps a list of free pages: it was closed in good order.
	db := must(bolt.Open(filepath.Join(dir, "index.db"), 0o600, &bolt.Options{NoSync: true}))(t)
	const perPack = packBytes / blockdev.AvgChunk
	layers = int(size / packBytes)
	chunks := uint64(layers) * perPack
	// Keys in ascending order fill the pages as they come.
	key := func(i, of uint64) []byte {
		k := sha256.Sum256(binary.BigEndian.AppendUint64(nil, i))
		binary.BigEndian.PutUint64(k[:], i*(math.MaxUint64/of))
		return k[:]
	}
	fill := func(bucket string, n uint64, record func(i uint64) (k, v []byte)) {
		const batch = 1 << 17
		for from := uint64(0); from < n; from += batch {
			noError(t, db.Update(func(tx *bolt.Tx) error {
				b, err := tx.CreateBucketIfNotExists([]byte(bucket))
				if err != nil {
					return err
				}
				b.FillPercent = 0.9
				for i := from; i < min(n, from+batch); i++ {
					if k, v := record(i); err == nil {
						err = b.Put(k, v)
					}
				}
				return err
			}))
		}
	}
	fill("meta", 1, func(uint64) (k, v []byte) { return []byte("format"), binary.LittleEndian.AppendUint32(nil, 1) })
	fill("chunks", chunks, func(i uint64) (k, v []byte) {
		r := make([]byte, 44)
		binary.LittleEndian.PutUint64(r, 1+i/perPack)
		binary.LittleEndian.PutUint64(r[8:], i%perPack*blockdev.AvgChunk)
		binary.LittleEndian.PutUint32(r[16:], blockdev.AvgChunk) // as stored
		binary.LittleEndian.PutUint32(r[20:], blockdev.AvgChunk)
		binary.LittleEndian.PutUint32(r[28:], 1) // references
		binary.LittleEndian.PutUint32(r[40:], crc32.Checksum(r[:40], crc32.MakeTable(crc32.Castagnoli)))
		return key(i, chunks), r
	})
	type extent struct {
		Pack   uint64 `json:"pack"`
		Offset int64  `json:"offset"`
		Length uint32 `json:"length"`
	}
	encode := func(v any) []byte { return must(json.Marshal(v))(t) }
	fill("diffs", uint64(layers), func(i uint64) (k, v []byte) {
		e := extent{Pack: 1 + i, Offset: packBytes - 1, Length: 1}
		return key(i, uint64(layers)), encode(map[string]any{"index": e, "refs": e, "used": time.Now().Unix()})
	})
	fill("layers", uint64(layers), func(i uint64) (k, v []byte) {
		diff := blockdev.Digest(key(i, uint64(layers)))
		return key(i, uint64(layers)), encode(map[string]any{"diffID": diff, "size": packBytes, "origins": []string{"registry.example/app"}})
	})
	fill("packs", uint64(layers), func(i uint64) (k, v []byte) {
		id := binary.BigEndian.AppendUint64(nil, 1+i)
		f := must(os.Create(filepath.Join(dir, "packs", fmt.Sprintf("%016x", 1+i))))(t)
		noError(t, f.Truncate(packBytes))
		noError(t, f.Close())
		return id, binary.LittleEndian.AppendUint64(nil, perPack+2)
	})
	noError(t, db.Sync())
	noError(t, db.Close())
	return layers
}
