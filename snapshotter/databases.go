package snapshotter

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
)

const (
	recordsFile  = "shoal.db"
	metadataFile = "metadata.db"
	// asideSuffix is what a damaged database's name gets.
	asideSuffix = ".damaged"
)

// openDatabases opens both databases. A damaged one is set aside, loudly, and a new
// one begun.
func (s *Snapshotter) openDatabases() error {
	records, metadata := filepath.Join(s.cfg.Root, recordsFile), filepath.Join(s.cfg.Root, metadataFile)
	err := checkRecords(records)
	if errors.Is(err, blockdev.ErrCorrupt) {
		aside, aerr := boltcheck.SetAside(records)
		if aerr != nil {
			return aerr
		}
		s.log.Error("the records of images are damaged and were set aside; layers are found again on disk, "+
			"but images are not listed, and lost layers not fetched again, before they are pulled again", "aside", aside, "error", err)
	}
	// The records go first: their lock keeps a second process off both files.
	if s.records, err = openRecords(records); err != nil {
		return err
	}
	err = boltcheck.File(metadata, nil)
	if errors.Is(err, blockdev.ErrCorrupt) {
		err = s.setMetadataAside(metadata, err)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil {
		s.ms, err = storage.NewMetaStore(metadata)
	}
	if err != nil {
		return errors.Join(err, s.records.close())
	}
	return nil
}

// setMetadataAside makes way for a new metadata.db. The directories of snapshots go
// with it: running containers write to them.
func (s *Snapshotter) setMetadataAside(metadata string, cause error) error {
	dirs := filepath.Join(s.cfg.Root, "s")
	dirsAside := dirs + asideSuffix
	for n := 2; ; n++ { // what was set aside before may be in use still
		if _, err := os.Lstat(dirsAside); errors.Is(err, fs.ErrNotExist) {
			break
		}
		dirsAside = fmt.Sprintf("%s%s-%d", dirs, asideSuffix, n)
	}
	if err := os.Rename(dirs, dirsAside); err != nil {
		return err
	}
	aside, err := boltcheck.SetAside(metadata)
	if err != nil {
		return err
	}
	s.log.Error("the snapshots' metadata is damaged and was set aside, with the directories that containers write to; running containers go on. "+
		"Remove all containers and images of this snapshotter and pull them again; until the files that were set aside are deleted, no layer is",
		"aside", []string{aside, dirsAside}, "error", cause)
	return os.Mkdir(dirs, 0o700)
}

// usesUnknown says that a metadata.db was set aside, so that nobody knows what
// running containers use.
func (s *Snapshotter) usesUnknown() bool {
	_, err := os.Lstat(filepath.Join(s.cfg.Root, metadataFile+asideSuffix))
	return err == nil
}

// checkRecords checks shoal.db; one that is not there is fine.
func checkRecords(path string) error {
	err := boltcheck.File(path, visitRecords)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

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

// adoptDiffs lists diffs that the data path has and no record names, since the
// records were lost.
func (s *Snapshotter) adoptDiffs() error {
	lister, ok := s.cfg.Data.(Lister)
	if !ok {
		return nil
	}
	data, ok := s.cfg.Data.(Implied)
	if !ok {
		return nil
	}
	listed, err := s.records.diffs()
	if err != nil {
		return err
	}
	known := make(map[blockdev.Digest]bool, len(listed))
	for _, id := range listed {
		known[id] = true
	}
	for _, id := range lister.Diffs() {
		if known[id] {
			continue
		}
		implied, err := data.Implied(id)
		if err != nil {
			s.log.Warn("a layer on disk cannot be listed", "diff", id, "error", err)
			continue
		}
		if err := s.records.adopt(id, implied); err != nil {
			return err
		}
	}
	return nil
}
