package images

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
)

// records is shoal.db: what this node knows about diffs, layers and images
// besides the snapshots. All of it can be lost without harm to a snapshot, except
// that diffs are not found any more that nobody uses.
//
//	diffs   DiffID (32 bytes)                      -> diffRecord
//	layers  registry host, 0, layer digest (32)    -> DiffID (32)
//	images  manifest digest (32), image reference  -> imageRecord
//
// Values other than DiffIDs are JSON.
type records struct{ db *bolt.DB }

// diffRecord is written before the diff is added to the data path, so that no
// diff is there which is not listed.
type diffRecord struct {
	// Added: the data path has taken the index.
	Added bool `json:"added,omitempty"`
	// Implied is blockdev.Index.Implied.
	Implied []string `json:"implied,omitempty"`
	// Layers are keys of the layers bucket that point here.
	Layers [][]byte `json:"layers,omitempty"`
}

// imageRecord is one image whose indexes this node has got.
type imageRecord struct {
	Ref      string          `json:"ref"`
	Host     string          `json:"host"`
	Manifest blockdev.Digest `json:"manifest"`
	Opened   time.Time       `json:"opened"`
	Top      string          `json:"top"` // ChainID of the top layer
	Layers   []Layer         `json:"layers"`
	// Grant is image.Image.Grant.
	Grant []byte `json:"grant,omitempty"`
	// Kept: KeepImage holds it.
	Kept bool `json:"kept,omitempty"`
	// Pulled: its top layer has been committed since it was opened.
	Pulled bool `json:"pulled,omitempty"`
	// Unfollowed: no container has started on it since it was pulled, and all of it is
	// to be fetched.
	Unfollowed bool `json:"unfollowed,omitempty"`
}

// diffs are those of the layers, each once.
func (r *imageRecord) diffs() []blockdev.Digest {
	ids := make([]blockdev.Digest, 0, len(r.Layers))
	for _, l := range r.Layers {
		if !slices.Contains(ids, l.DiffID) {
			ids = append(ids, l.DiffID)
		}
	}
	return ids
}

func (r *imageRecord) key() []byte { return append(slices.Clone(r.Manifest[:]), r.Ref...) }

func getImage(b *bolt.Bucket, key []byte) (rec imageRecord, ok bool, err error) {
	v := b.Get(key)
	if v == nil {
		return rec, false, nil
	}
	if err := json.Unmarshal(v, &rec); err != nil {
		return rec, false, fmt.Errorf("record of an image: %w", err)
	}
	return rec, true, nil
}

func putImage(b *bolt.Bucket, rec imageRecord) error {
	v, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return b.Put(rec.key(), v)
}

var (
	bucketDiffs  = []byte("diffs")
	bucketLayers = []byte("layers")
	bucketImages = []byte("images")
)

// File is the name of the records' file below Config.Root.
const File = "shoal.db"

// openRecords opens the records. If they are damaged, they are set aside, loudly, and new
// ones begun.
func openRecords(root string, log *slog.Logger) (*records, error) {
	path := filepath.Join(root, File)
	if err := Inspect(root); errors.Is(err, blockdev.ErrCorrupt) {
		aside, aerr := boltcheck.SetAside(path)
		if aerr != nil {
			return nil, aerr
		}
		log.Error("the records of images are damaged and were set aside; layers on disk are found again, "+
			"but images are not listed, and lost layers are not fetched again, until you pull the images again", "aside", aside, "error", err)
	}
	// A second process on the same directory must fail, not hang.
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("open %s: another process uses it", path)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{bucketDiffs, bucketLayers, bucketImages} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("set up %s: %w", path, err), db.Close())
	}
	return &records{db: db}, nil
}

func (r *records) close() error { return r.db.Close() }

func layerKey(host string, layer blockdev.Digest) []byte {
	return append(append([]byte(host), 0), layer[:]...)
}

func getDiff(tx *bolt.Tx, id blockdev.Digest) (rec diffRecord, ok bool, err error) {
	v := tx.Bucket(bucketDiffs).Get(id[:])
	if v == nil {
		return rec, false, nil
	}
	if err := json.Unmarshal(v, &rec); err != nil {
		return rec, false, fmt.Errorf("record of diff %s: %w", id, err)
	}
	return rec, true, nil
}

func putDiff(tx *bolt.Tx, id blockdev.Digest, rec diffRecord) error {
	v, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return tx.Bucket(bucketDiffs).Put(id[:], v)
}

// intend lists diffs that are about to be added.
func (r *records) intend(ids []blockdev.Digest) error {
	return r.db.Update(func(tx *bolt.Tx) error {
		for _, id := range ids {
			_, ok, err := getDiff(tx, id)
			if err != nil {
				return err
			}
			if ok {
				continue
			}
			if err := putDiff(tx, id, diffRecord{}); err != nil {
				return err
			}
		}
		return nil
	})
}

// adoptAll lists diffs that the data path has and no record names, since the records
// were lost.
func (r *records) adoptAll(data Data, log *slog.Logger) error {
	listed, err := r.diffs()
	if err != nil {
		return err
	}
	known := make(map[blockdev.Digest]bool, len(listed))
	for _, id := range listed {
		known[id] = true
	}
	for _, id := range data.Diffs() {
		if known[id] {
			continue
		}
		implied, err := data.Implied(id)
		if err != nil {
			log.Warn("cannot list a layer on disk", "diff", id, "error", err)
			continue
		}
		err = r.db.Update(func(tx *bolt.Tx) error { return putDiff(tx, id, diffRecord{Added: true, Implied: implied}) })
		if err != nil {
			return err
		}
	}
	return nil
}

// opened stores an image all of whose diffs have been added. implied has an entry
// for each diff whose index was read just now.
func (r *records) opened(img imageRecord, implied map[blockdev.Digest][]string) error {
	return r.db.Update(func(tx *bolt.Tx) error {
		for _, l := range img.Layers {
			rec, _, err := getDiff(tx, l.DiffID)
			if err != nil {
				return err
			}
			rec.Added = true
			if dirs, ok := implied[l.DiffID]; ok {
				rec.Implied = dirs
			}
			key := layerKey(img.Host, l.Digest)
			if !slices.ContainsFunc(rec.Layers, func(k []byte) bool { return slices.Equal(k, key) }) {
				rec.Layers = append(rec.Layers, key)
			}
			if err := putDiff(tx, l.DiffID, rec); err != nil {
				return err
			}
			if err := tx.Bucket(bucketLayers).Put(key, l.DiffID[:]); err != nil {
				return err
			}
		}
		b := tx.Bucket(bucketImages)
		old, _, err := getImage(b, img.key())
		if err != nil {
			return err
		}
		img.Kept, img.Unfollowed = old.Kept, old.Unfollowed
		return putImage(b, img)
	})
}

// rename puts an image on record under another reference; the old record goes,
// unless it is kept.
func (r *records) rename(img imageRecord, ref string) error {
	return r.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketImages)
		old, ok, err := getImage(b, img.key())
		if err == nil && ok && !old.Kept {
			err = b.Delete(img.key())
		}
		if err != nil {
			return err
		}
		img.Ref = ref
		if old, _, err = getImage(b, img.key()); err != nil {
			return err
		}
		img.Kept = old.Kept
		return putImage(b, img)
	})
}

// have returns which of the layers, of this registry host, have an index here.
func (r *records) have(host string, layers []blockdev.Digest) (map[blockdev.Digest]blockdev.Digest, error) {
	found := make(map[blockdev.Digest]blockdev.Digest)
	err := r.db.View(func(tx *bolt.Tx) error {
		for _, l := range layers {
			v := tx.Bucket(bucketLayers).Get(layerKey(host, l))
			if len(v) != len(l) {
				continue
			}
			id := blockdev.Digest(v)
			rec, _, err := getDiff(tx, id)
			if err != nil {
				return err
			}
			if rec.Added {
				found[l] = id
			}
		}
		return nil
	})
	return found, err
}

// implied is blockdev.Index.Implied of a diff that has been added.
func (r *records) implied(id blockdev.Digest) (dirs []string, err error) {
	err = r.db.View(func(tx *bolt.Tx) error {
		rec, ok, err := getDiff(tx, id)
		if err == nil && !ok {
			err = fmt.Errorf("diff %s: %w", id, blockdev.ErrNotFound)
		}
		dirs = rec.Implied
		return err
	})
	return dirs, err
}

// change has f change the record of an image, if there is one (ok), and stores it if f
// says so.
func (r *records) change(img *imageRecord, f func(rec *imageRecord, ok bool) (store bool, err error)) error {
	return r.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketImages)
		rec, ok, err := getImage(b, img.key())
		if err != nil {
			return err
		}
		if store, err := f(&rec, ok); err != nil || !store {
			return err
		}
		return putImage(b, rec)
	})
}

// keep marks an image as kept; false: it was before.
func (r *records) keep(img *imageRecord) (changed bool, err error) {
	err = r.change(img, func(rec *imageRecord, ok bool) (bool, error) {
		if !ok {
			return false, fmt.Errorf("image %s: %w", img.Ref, blockdev.ErrNotFound)
		}
		changed = !rec.Kept
		rec.Kept = true
		return changed, nil
	})
	return changed, err
}

// followed takes imageRecord.Unfollowed back. An image that is not listed any more is
// no error.
func (r *records) followed(img *imageRecord) error {
	return r.change(img, func(rec *imageRecord, ok bool) (bool, error) {
		unfollowed := ok && rec.Unfollowed
		rec.Unfollowed = false
		return unfollowed, nil
	})
}

// pulled notes that all layers of an image are snapshots now, and sets Unfollowed. A
// record that was dropped since is written again.
func (r *records) pulled(img imageRecord, unfollowed bool) error {
	return r.change(&img, func(rec *imageRecord, ok bool) (bool, error) {
		if !ok {
			*rec = img
		}
		rec.Pulled, rec.Unfollowed = true, unfollowed
		return true, nil
	})
}

// release ends the keeping of a manifest, under all references, and returns the
// records that were kept.
func (r *records) release(manifest blockdev.Digest) (changed []imageRecord, err error) {
	list, err := r.images()
	if err != nil || !slices.ContainsFunc(list, func(i imageRecord) bool { return i.Kept && i.Manifest == manifest }) {
		return nil, err // the usual case, without a write
	}
	err = r.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketImages)
		for _, img := range list {
			rec, ok, err := getImage(b, img.key())
			if err != nil {
				return err
			}
			if !ok || !rec.Kept || rec.Manifest != manifest {
				continue
			}
			rec.Kept = false
			if err := putImage(b, rec); err != nil {
				return err
			}
			changed = append(changed, rec)
		}
		return nil
	})
	return changed, err
}

// diffs lists all diffs.
func (r *records) diffs() (ids []blockdev.Digest, err error) {
	err = r.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketDiffs).ForEach(func(k, _ []byte) error {
			if len(k) != len(blockdev.Digest{}) {
				return fmt.Errorf("record of a diff has a key of %d bytes", len(k))
			}
			ids = append(ids, blockdev.Digest(k))
			return nil
		})
	})
	return ids, err
}

// forget drops a diff and the layers that point to it.
func (r *records) forget(id blockdev.Digest) error {
	return r.db.Update(func(tx *bolt.Tx) error {
		rec, _, err := getDiff(tx, id)
		if err != nil {
			return err
		}
		for _, key := range rec.Layers {
			if !slices.Equal(tx.Bucket(bucketLayers).Get(key), id[:]) {
				continue
			}
			if err := tx.Bucket(bucketLayers).Delete(key); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketDiffs).Delete(id[:])
	})
}

func (r *records) images() (list []imageRecord, err error) {
	err = r.db.View(func(tx *bolt.Tx) error {
		list, err = imagesIn(tx)
		return err
	})
	return list, err
}

func imagesIn(tx *bolt.Tx) (list []imageRecord, err error) {
	err = tx.Bucket(bucketImages).ForEach(func(_, v []byte) error {
		var rec imageRecord
		if err := json.Unmarshal(v, &rec); err != nil {
			return fmt.Errorf("record of an image: %w", err)
		}
		list = append(list, rec)
		return nil
	})
	return list, err
}

// prune drops the images that choose picks of all, with those on record then, and
// returns them and those that are left. No record changes during the call.
func (r *records) prune(choose func([]imageRecord) ([]imageRecord, error)) (gone, left []imageRecord, err error) {
	list, err := r.images()
	if err != nil {
		return nil, nil, err
	}
	if gone, err = choose(list); err != nil || len(gone) == 0 {
		return nil, list, err // the usual case, without a write
	}
	err = r.db.Update(func(tx *bolt.Tx) error {
		if list, err = imagesIn(tx); err != nil {
			return err
		}
		if gone, err = choose(list); err != nil {
			return err
		}
		left = nil
		for _, img := range list {
			if !slices.ContainsFunc(gone, func(g imageRecord) bool { return slices.Equal(g.key(), img.key()) }) {
				left = append(left, img)
			}
		}
		for _, img := range gone {
			if err := tx.Bucket(bucketImages).Delete(img.key()); err != nil {
				return err
			}
		}
		return nil
	})
	return gone, left, err
}
