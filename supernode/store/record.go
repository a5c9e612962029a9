package store

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
)

// formatVersion is that of a store with a layer that was published in batches; one
// without is of firstFormat, which earlier versions read.
const (
	firstFormat   = 1
	formatVersion = 2
)

var (
	bucketMeta    = []byte("meta")
	bucketChunks  = []byte("chunks")
	bucketDiffs   = []byte("diffs")
	bucketLayers  = []byte("layers")
	bucketPacks   = []byte("packs")
	bucketDead    = []byte("dead")
	bucketOrphans = []byte("orphans")
	bucketDue     = []byte("due")
	// bucketUnpublished has what no diff counts for, and references count.
	bucketUnpublished = []byte("unpublished")
	keyFormat         = []byte("format")
)

func allBuckets() [][]byte {
	return [][]byte{bucketMeta, bucketChunks, bucketDiffs, bucketLayers, bucketPacks, bucketDead, bucketOrphans, bucketDue, bucketUnpublished}
}

const (
	flagZstd    = 1
	flagDamaged = 2
	// flagDue: raw, because it was not tried to compress it yet.
	flagDue = 4
)

const chunkRecordLen = 44

// castagnoli is CRC-32C, which amd64 and arm64 compute in hardware.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// extent is a range of a pack with the checksum of its bytes.
type extent struct {
	Pack   uint64 `json:"pack"`
	Offset int64  `json:"offset"` // bytes
	Length uint32 `json:"length"` // bytes, as stored
	CRC    uint32 `json:"crc32c"`
}

// chunkRecord says where a chunk is and how many diffs refer to it.
type chunkRecord struct {
	extent
	raw   uint32 // bytes, of the chunk itself
	refs  uint32
	flags uint32
}

func (r chunkRecord) damaged() bool { return r.flags&flagDamaged != 0 }

// manyRefs is the count of a chunk that cannot be counted: never zero before the recount.
const manyRefs = 1 << 30

// lostChunk takes the place of a record that cannot be read: a damaged chunk that lies
// nowhere.
func lostChunk(refs uint32) chunkRecord { return chunkRecord{refs: refs, flags: flagDamaged} }

func (r chunkRecord) lost() bool { return r.Length == 0 }

func (r chunkRecord) encode() []byte {
	b := make([]byte, chunkRecordLen)
	binary.LittleEndian.PutUint64(b[0:], r.Pack)
	binary.LittleEndian.PutUint64(b[8:], uint64(r.Offset))
	binary.LittleEndian.PutUint32(b[16:], r.Length)
	binary.LittleEndian.PutUint32(b[20:], r.raw)
	binary.LittleEndian.PutUint32(b[24:], r.CRC)
	binary.LittleEndian.PutUint32(b[28:], r.refs)
	binary.LittleEndian.PutUint32(b[32:], r.flags)
	// 4 bytes of zero, then the checksum over all before it.
	binary.LittleEndian.PutUint32(b[40:], checksum(b[:40]))
	return b
}

// decodeChunk reads a record. bbolt has no checksums on its pages, hence ours.
func decodeChunk(b []byte) (chunkRecord, error) {
	if len(b) != chunkRecordLen || binary.LittleEndian.Uint32(b[40:]) != checksum(b[:40]) {
		return chunkRecord{}, fmt.Errorf("chunk record in index.db: %w", blockdev.ErrCorrupt)
	}
	r := chunkRecord{
		extent: extent{
			Pack:   binary.LittleEndian.Uint64(b[0:]),
			Offset: int64(binary.LittleEndian.Uint64(b[8:])),
			Length: binary.LittleEndian.Uint32(b[16:]),
			CRC:    binary.LittleEndian.Uint32(b[24:]),
		},
		raw:   binary.LittleEndian.Uint32(b[20:]),
		refs:  binary.LittleEndian.Uint32(b[28:]),
		flags: binary.LittleEndian.Uint32(b[32:]),
	}
	if r.Offset < 0 || r.raw > blockdev.MaxChunk || r.Length > r.raw {
		return chunkRecord{}, fmt.Errorf("chunk record in index.db: %w", blockdev.ErrCorrupt)
	}
	return r, nil
}

// diffRecord is the JSON of bucket diffs.
type diffRecord struct {
	// Index is the encoded index, Refs the first reference list, More the others.
	Index extent   `json:"index"`
	Refs  extent   `json:"refs"`
	More  []extent `json:"more,omitempty"`
	// Used is when the diff was last asked for, in Unix seconds, coarsely.
	Used int64 `json:"used"`
}

func (r diffRecord) lists() []extent { return append([]extent{r.Refs}, r.More...) }

// unpublishedRecord is the JSON of bucket unpublished: references that belong to no
// diff, since its layer is still coming or its diff was removed.
type unpublishedRecord struct {
	// Lists are reference lists, of chunks that have one reference for each.
	Lists []extent `json:"lists"`
	// Index is that of a diff that was removed.
	Index *extent `json:"index,omitempty"`
	// Ended: what an ingest has put behind the last of its lists is freed.
	Ended bool `json:"ended,omitempty"`
}

// layerRecord is the JSON of bucket layers.
type layerRecord struct {
	DiffID  blockdev.Digest `json:"diffID"`
	Size    int64           `json:"size"`
	Origins []string        `json:"origins"`
}

func (r layerRecord) public(layer blockdev.Digest) LayerRecord {
	return LayerRecord{Layer: layer, Size: r.Size, DiffID: r.DiffID, Origins: slices.Clone(r.Origins)}
}

func decodeJSON(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("record in index.db: %w: %w", blockdev.ErrCorrupt, err)
	}
	return nil
}

func packKey(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

func deadKey(id uint64, off int64) []byte {
	return binary.BigEndian.AppendUint64(packKey(id), uint64(off))
}
