package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/table"
)

const (
	indexFile  = "index"
	metaFile   = "meta"
	dataFile   = "data"
	bitmapFile = "bitmap"

	// dataAlign is what the data file's length is a multiple of, as a loop
	// device or a block device would have it.
	dataAlign = 4096
)

const (
	ownIndexFile = "index.own"
	ownMetaFile  = "meta.own"
)

// headersFile holds the pieces of the header stream, one behind the other, as far
// as they have been fetched. Which are there is written nowhere: a piece counts
// only if it has its digest when it is read.
const headersFile = "headers"

// folder is where a diff's files lie. It reads them for what opens, checks or inspects a
// diff.
type folder struct {
	dir string
	id  blockdev.Digest
}

func (f folder) path(name string) string { return filepath.Join(f.dir, name) }

// index reads the index as it came. sum is the SHA-256 of its file. Of one that is missing
// or empty a power loss has cut the diff short.
func (f folder) index(decode func([]byte) (*blockdev.Index, error)) (ix *blockdev.Index, sum blockdev.Digest, tab *table.Table, err error) {
	enc, err := os.ReadFile(f.path(indexFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(enc) == 0 {
		err = fmt.Errorf("index is missing: %w", blockdev.ErrCorrupt)
	}
	if err != nil {
		return nil, sum, nil, err
	}
	if ix, err = decode(enc); err == nil && ix.DiffID != f.id {
		err = fmt.Errorf("it is the index of diff %v: %w", ix.DiffID, blockdev.ErrCorrupt)
	}
	if err == nil {
		tab, err = table.New(ix)
	}
	if err != nil {
		return nil, sum, nil, fmt.Errorf("index: %w", err)
	}
	return ix, blockdev.Sum(enc), tab, nil
}

// ownIndex reads the index of the tree that is shown in place of the one that came. sum
// is on record.
func (f folder) ownIndex(sum blockdev.Digest, decode func([]byte) (*blockdev.Index, error)) (*blockdev.Index, error) {
	path := f.path(ownIndexFile)
	enc, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if blockdev.Sum(enc) != sum {
		return nil, fmt.Errorf("%s is not the one on record: %w", path, blockdev.ErrCorrupt)
	}
	ix, err := decode(enc)
	if err == nil && ix.DiffID != f.id {
		err = fmt.Errorf("it is the index of diff %v: %w", ix.DiffID, blockdev.ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ix, nil
}

// proof reads the record of the diff's proof.
func (f folder) proof() (proofRecord, error) { return readProof(f.path(proofFile), f.id) }
