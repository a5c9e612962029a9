package lab

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

// PackBytes is how long the layers of MakeStore are, and their packs.
const PackBytes = 64 << 20

// MakeStore makes up the store of a supernode in dir, in place of what is there, and
// returns how many layers it has: an index.db (doc.go of package store) with the records
// of size bytes of chunks, as a supernode leaves it that was stopped in good order, and
// packs of that length that are all hole.
func MakeStore(dir string, size int64) (layers int, err error) {
	if err := os.RemoveAll(dir); err != nil {
		return 0, err
	}
	if err := os.MkdirAll(filepath.Join(dir, "packs"), 0o700); err != nil {
		return 0, err
	}
	// With bbolt's defaults it keeps a list of free pages: it was closed in good order.
	db, err := bolt.Open(filepath.Join(dir, "index.db"), 0o600, &bolt.Options{NoSync: true})
	if err != nil {
		return 0, err
	}
	layers = int(size / PackBytes)
	err = fillStore(db, layers)
	for i := range layers {
		if err == nil {
			err = makePack(filepath.Join(dir, "packs", fmt.Sprintf("%016x", 1+i)))
		}
	}
	if err == nil {
		err = db.Sync()
	}
	return layers, errors.Join(err, db.Close())
}

func makePack(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(PackBytes), f.Close())
}

// storeExtent is a place in a pack.
type storeExtent struct {
	Pack   uint64 `json:"pack"`
	Offset int64  `json:"offset"`
	Length uint32 `json:"length"`
}

// fillStore writes the records.
func fillStore(db *bolt.DB, layers int) error {
	const perPack = PackBytes / blockdev.AvgChunk
	all, chunks := uint64(layers), uint64(layers)*perPack
	for _, b := range []struct {
		bucket string
		n      uint64
		record func(i uint64) (k, v []byte, err error)
	}{
		{"meta", 1, func(uint64) (k, v []byte, err error) {
			return []byte("format"), binary.LittleEndian.AppendUint32(nil, 1), nil
		}},
		{"chunks", chunks, func(i uint64) (k, v []byte, err error) {
			r := make([]byte, 44)
			binary.LittleEndian.PutUint64(r, 1+i/perPack)
			binary.LittleEndian.PutUint64(r[8:], i%perPack*blockdev.AvgChunk)
			binary.LittleEndian.PutUint32(r[16:], blockdev.AvgChunk) // as stored
			binary.LittleEndian.PutUint32(r[20:], blockdev.AvgChunk)
			binary.LittleEndian.PutUint32(r[28:], 1) // references
			binary.LittleEndian.PutUint32(r[40:], crc32.Checksum(r[:40], crc32.MakeTable(crc32.Castagnoli)))
			return storeKey(i, chunks), r, nil
		}},
		{"diffs", all, func(i uint64) (k, v []byte, err error) {
			e := storeExtent{Pack: 1 + i, Offset: PackBytes - 1, Length: 1}
			v, err = json.Marshal(map[string]any{"index": e, "refs": e, "used": time.Now().Unix()})
			return storeKey(i, all), v, err
		}},
		{"layers", all, func(i uint64) (k, v []byte, err error) {
			diff := blockdev.Digest(storeKey(i, all))
			v, err = json.Marshal(map[string]any{"diffID": diff, "size": PackBytes, "origins": []string{"registry.example/app"}})
			return storeKey(i, all), v, err
		}},
		{"packs", all, func(i uint64) (k, v []byte, err error) {
			return binary.BigEndian.AppendUint64(nil, 1+i), binary.LittleEndian.AppendUint64(nil, perPack+2), nil
		}},
	} {
		if err := fillBucket(db, b.bucket, b.n, b.record); err != nil {
			return fmt.Errorf("bucket %s: %w", b.bucket, err)
		}
	}
	return nil
}

// storeKey is key i of so many: in ascending order they fill the pages as they come.
func storeKey(i, of uint64) []byte {
	k := sha256.Sum256(binary.BigEndian.AppendUint64(nil, i))
	binary.BigEndian.PutUint64(k[:], i*(math.MaxUint64/of))
	return k[:]
}

// fillBucket puts n records into a bucket, some in each transaction.
func fillBucket(db *bolt.DB, bucket string, n uint64, record func(i uint64) (k, v []byte, err error)) error {
	const batch = 1 << 17
	for from := uint64(0); from < n; from += batch {
		if err := db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte(bucket))
			if err != nil {
				return err
			}
			b.FillPercent = 0.9
			for i := from; i < min(n, from+batch); i++ {
				k, v, err := record(i)
				if err == nil {
					err = b.Put(k, v)
				}
				if err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}
