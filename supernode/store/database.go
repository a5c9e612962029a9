package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
)

// errDamaged: index.db cannot be read.
var errDamaged = fmt.Errorf("index.db: %w", blockdev.ErrCorrupt)

// database is index.db: how it is opened and closed, and what is read of it one record at
// a time. A change writes to it.
type database struct {
	*bolt.DB
	dir      string
	log      *slog.Logger
	doubtful atomic.Bool // index.db has shown damage
}

func dbPath(dir string) string { return filepath.Join(dir, "index.db") }

// openDatabase opens index.db; one that is no database any more is replaced. All of it is
// read only with thorough, or if it was not closed in good order: that takes as long as
// the store is large.
func openDatabase(dir string, thorough bool, log *slog.Logger) (*database, error) {
	d := &database{dir: dir, log: log}
	path := dbPath(dir)
	open := func() error {
		sealed, err := boltcheck.Sealed(path)
		if err == nil && (!sealed || thorough) {
			err = boltcheck.Pages(path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		d.DB, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:      time.Second, // for the lock
			FreelistType: bolt.FreelistMapType,
			// The free list is written by Close, and else rebuilt at open: writing it
			// at every commit costs more.
			NoFreelistSync: true,
			// Address space, not memory: growing a smaller map waits for readers, and
			// a check reads for as long as it takes.
			InitialMmapSize: 16 << 30,
		})
		return err
	}
	err := guard(open)
	if errors.Is(err, bolterrors.ErrTimeout) || errors.Is(err, boltcheck.ErrInUse) {
		return nil, fmt.Errorf("store: %s is in use by another process", dir)
	}
	if errors.Is(err, bolterrors.ErrInvalid) || errors.Is(err, bolterrors.ErrChecksum) || errors.Is(err, bolterrors.ErrVersionMismatch) ||
		errors.Is(err, blockdev.ErrCorrupt) {
		log.Error("the store's index is damaged; starting with an empty store", "dir", dir, "error", err)
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		err = guard(open)
	}
	if err != nil {
		return nil, diskError("open index.db", err)
	}
	return d, nil
}

// guard turns a panic of bbolt, which is how it reports a damaged page, into an
// error, so that one bad page does not take the process down.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a page number far off
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("store: %w: %v", errDamaged, r)
		}
	}()
	return f()
}

// guard is guard for what is done with an open index.db: after damage the next Open is to
// check it in full.
func (d *database) guard(f func() error) error {
	err := guard(f)
	if errors.Is(err, errDamaged) && !d.doubtful.Swap(true) {
		d.log.Error("the store's index is damaged; restart the supernode: it checks the index and begins with an empty store", "dir", d.dir, "error", err)
	}
	return err
}

// view runs a read transaction.
func (d *database) view(f func(tx *bolt.Tx) error) error {
	return mapClosed(d.guard(func() error { return d.View(f) }))
}

func mapClosed(err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

// seal closes index.db in good order, unless there is doubt about it.
func (d *database) seal() error {
	var err error
	if !d.doubtful.Load() {
		if err = boltcheck.Seal(d.DB); errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
			err = nil
		}
	}
	return errors.Join(err, d.Close())
}

// chunk reads a chunk's record.
func (d *database) chunk(id blockdev.Digest) (r chunkRecord, ok bool, err error) {
	err = d.view(func(tx *bolt.Tx) error {
		v := tx.Bucket(bucketChunks).Get(id[:])
		if v == nil {
			return nil
		}
		ok = true
		var err error
		r, err = decodeChunk(v)
		return err
	})
	return r, ok, err
}

// diff reads a diff's record.
func (d *database) diff(id blockdev.Digest) (r diffRecord, ok bool, err error) {
	err = d.view(func(tx *bolt.Tx) error {
		r, ok, err = getDiff(tx, id)
		return err
	})
	return r, ok, err
}

// unpublished reads the record of a pack's session, or of a diff that was removed.
func (d *database) unpublished(id uint64) (r unpublishedRecord, ok bool, err error) {
	err = d.view(func(tx *bolt.Tx) error {
		v := tx.Bucket(bucketUnpublished).Get(packKey(id))
		if ok = v != nil; !ok {
			return nil
		}
		return decodeJSON(v, &r)
	})
	return r, ok, err
}

// allUnpublished are the packs of all unpublished records.
func (d *database) allUnpublished() (ids []uint64, err error) {
	err = d.view(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketUnpublished).ForEach(func(k, _ []byte) error {
			if len(k) == 8 {
				ids = append(ids, binary.BigEndian.Uint64(k))
			}
			return nil
		})
	})
	return ids, err
}

// due is an entry of the bucket due.
type due struct {
	key []byte
	d   blockdev.Digest
	rec chunkRecord
	// stale: the chunk is not there any more. Left by damage to index.db only.
	stale bool
}

// dueAfter returns the next entries, at least one and up to n raw bytes of them.
func (d *database) dueAfter(after []byte, n int64) ([]due, error) {
	var todo []due
	err := d.view(func(tx *bolt.Tx) error {
		chunks, c := tx.Bucket(bucketChunks), tx.Bucket(bucketDue).Cursor()
		k, v := c.Seek(after)
		if len(after) > 0 && bytes.Equal(k, after) {
			k, v = c.Next()
		}
		for ; k != nil && n > 0; k, v = c.Next() {
			t := due{key: bytes.Clone(k), stale: true}
			if len(v) == dueValueLen {
				copy(t.d[:], v)
				rec, err := decodeChunk(chunks.Get(t.d[:]))
				if err == nil && rec.flags&flagDue != 0 && bytes.Equal(dueKey(rec.extent), k) {
					t.rec, t.stale = rec, false
				}
			}
			todo = append(todo, t)
			n -= max(1, int64(t.rec.raw))
		}
		return nil
	})
	return todo, err
}
