package images

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
)

// Inspect checks the records below root while no Catalogue has them open; if one has,
// the error wraps boltcheck.ErrInUse. It wraps fs.ErrNotExist if there are none, and
// blockdev.ErrCorrupt if they are damaged: Open sets them aside then.
func Inspect(root string) error { return boltcheck.File(filepath.Join(root, File), visitRecords) }

// Check checks the records while the catalogue is in use.
func (c *Catalogue) Check() error { return boltcheck.Live(c.records.db, visitRecords) }

// visitRecords reads every record.
func visitRecords(tx *bolt.Tx) error {
	visit := func(bucket []byte, f func(k, v []byte) error) error {
		b := tx.Bucket(bucket)
		if b == nil {
			return nil
		}
		return b.ForEach(f)
	}
	size := len(blockdev.Digest{})
	return errors.Join(
		visit(bucketDiffs, func(k, v []byte) error {
			var rec diffRecord
			if err := json.Unmarshal(v, &rec); err != nil || len(k) != size {
				return fmt.Errorf("record of a layer: %x: %w", k, errors.Join(err, blockdev.ErrCorrupt))
			}
			return nil
		}),
		visit(bucketLayers, func(k, v []byte) error {
			if len(k) < size || len(v) != size {
				return fmt.Errorf("record of a blob: %x: %w", k, blockdev.ErrCorrupt)
			}
			return nil
		}),
		visit(bucketImages, func(k, v []byte) error {
			var rec imageRecord
			if err := json.Unmarshal(v, &rec); err != nil || string(rec.key()) != string(k) {
				return fmt.Errorf("record of an image: %x: %w", k, errors.Join(err, blockdev.ErrCorrupt))
			}
			return nil
		}),
	)
}
