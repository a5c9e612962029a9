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
	// asideSuffix is what the name of a damaged database gets, and that of what goes
	// with it.
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
		s.log.Error("the records of images are damaged and were set aside; layers on disk are found again, "+
			"but images are not listed, and lost layers are not fetched again, until you pull the images again", "aside", aside, "error", err)
	}
	// The records go first: their lock keeps a second process off both files.
	if s.records, err = openRecords(records); err != nil {
		return err
	}
	if err = metadataLost(s.cfg.Root); err == nil {
		err = boltcheck.File(metadata, nil)
	}
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

// metadataLost returns an error that wraps blockdev.ErrCorrupt if there is no
// metadata, or a file without anything in it, and yet there are directories of
// snapshots: a repair of the file system, a restore or a slip has taken it away, and
// running containers may write to these directories.
func metadataLost(root string) error {
	st, err := os.Stat(filepath.Join(root, metadataFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && st.Size() > 0 {
		return nil
	}
	dirs, err := os.ReadDir(filepath.Join(root, "s"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) || len(dirs) == 0 {
		return err
	}
	return fmt.Errorf("%s is missing or empty, but there are directories of %d snapshots: %w", metadataFile, len(dirs), blockdev.ErrCorrupt)
}

// setMetadataAside makes way for a new metadata.db. The directories of snapshots go
// with it: running containers write to them. After a crash in the middle, the next
// start goes on.
func (s *Snapshotter) setMetadataAside(metadata string, cause error) error {
	aside, err := boltcheck.SetAside(metadata)
	if err != nil {
		return err
	}
	// It tells usesUnknown, also if there was nothing to set aside.
	mark, err := os.OpenFile(aside, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := mark.Close(); err != nil {
		return err
	}
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
	s.log.Error("the snapshots' metadata is damaged or lost; it was set aside, with the directories that containers write to; running containers go on. "+
		"Remove all containers and images of this snapshotter, and pull the images again; the node deletes no layer until you delete the files that were set aside",
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
	listed, err := s.records.diffs()
	if err != nil {
		return err
	}
	known := make(map[blockdev.Digest]bool, len(listed))
	for _, id := range listed {
		known[id] = true
	}
	for _, id := range s.cfg.Data.Diffs() {
		if known[id] {
			continue
		}
		implied, err := s.cfg.Data.Implied(id)
		if err != nil {
			s.log.Warn("cannot list a layer on disk", "diff", id, "error", err)
			continue
		}
		if err := s.records.adopt(id, implied); err != nil {
			return err
		}
	}
	return nil
}
