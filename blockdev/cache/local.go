package cache

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
	"github.com/shoalfs/shoal/blockdev/cache/internal/table"
)

// Errors of callers that need all bytes of a diff. Prefetch brings them back.
var (
	// ErrIncomplete: bytes are missing.
	ErrIncomplete = errors.New("the diff is not complete on this disk")
	// ErrDamaged: bytes have turned out to be wrong, and count as missing now.
	ErrDamaged = errors.New("the diff is damaged on this disk")
)

// local is what of one diff is on disk: its files, and which chunks they have. It does
// not know where missing ones come from.
type local struct {
	folder
	c    *shared
	sum  blockdev.Digest // of the encoded index
	tab  *table.Table
	pres *presence.Chunks
	size int64 // of the data file

	data, bitmap *os.File
	share        room.Share // of the disk
	complete     atomic.Bool
	completed    atomic.Bool  // complete now, or was before
	bitmapBad    atomic.Bool  // logged that the bitmap cannot be written
	keep         atomic.Int64 // Unix nanoseconds until when a sync leaves pages in the page cache

	syncing chan struct{} // token: one sync at a time
	stopped error         // why there will be no further sync; guarded by syncing
}

// DataPath returns the path of the data file. Only when Complete is true does it
// have all bytes, and may be read by other means than this package.
func (d *local) DataPath() string { return d.path(dataFile) }

// Complete reports whether every chunk is present, was checked and is on stable
// storage. It turns false again only if a chunk is found damaged on disk.
func (d *local) Complete() bool { return d.complete.Load() }

// setComplete says that the diff is complete.
func (d *local) setComplete() {
	d.complete.Store(true)
	d.completed.Store(true)
}

// pread reads what is present. On an error other than os.ErrClosed the chunks of
// the range that cannot be read are no longer present.
func (d *local) pread(p []byte, off int64) error {
	lo, hi := d.tab.Span(off, off+int64(len(p)))
	settled := d.complete.Load() || d.pres.SyncedAll(lo, hi) // when the read begins
	_, err := d.data.ReadAt(p, off)
	if err == nil && !settled {
		err = d.checkLost(p, off, lo, hi)
	}
	if err == nil || errors.Is(err, os.ErrClosed) {
		return err
	}
	for i := lo; i < hi; i++ {
		from, to := d.overlap(i, off, len(p))
		if _, err := d.data.ReadAt(p[from-off:to-off], from); err != nil {
			d.damaged(i, err)
		}
	}
	return err
}

// overlap is the part of chunk i within [off, off+n).
func (d *local) overlap(i int, off int64, n int) (from, to int64) {
	return max(off, d.tab.Start(i)), min(off+int64(n), d.tab.Start(i+1))
}

// readChunk reads chunk i into buf, which has its length, and checks it: nothing is
// passed on that the disk has spoiled. The error is ErrIncomplete, ErrDamaged (the chunk
// is missing from then on), or os.ErrClosed.
func (d *local) readChunk(i int, buf []byte) error {
	if !d.pres.Has(i) {
		return ErrIncomplete
	}
	_, err := d.data.ReadAt(buf, d.tab.Start(i))
	if errors.Is(err, os.ErrClosed) {
		return err
	}
	if err == nil && !d.tab.Check(i, buf) {
		err = blockdev.ErrCorrupt
	}
	if err != nil {
		if !d.pres.Has(i) {
			return ErrIncomplete // it was taken off the disk since
		}
		d.damaged(i, err)
		return ErrDamaged
	}
	return nil
}

// verify is readChunk for a caller that reads everything: the chunk counts as checked, and its
// pages need not stay.
func (d *local) verify(i int, buf []byte) error {
	if err := d.readChunk(i, buf); err != nil {
		return err
	}
	d.pres.Check(i)
	d.Drop(d.tab.Start(i), len(buf))
	return nil
}

// damaged is called when a chunk that was thought present cannot be read, or
// does not have its digest. The chunk is missing from then on, and Config.Damaged
// sees to the rest.
func (d *local) damaged(k int, why error) {
	wasComplete := d.complete.Swap(false)
	if !d.pres.Drop(k) {
		return
	}
	d.c.stats.damaged.Add(1)
	d.c.cfg.Log.Error("a chunk on this disk is damaged; it is fetched again",
		"diff", d.id, "chunk", k, "offset", d.tab.Start(k), "bytes", d.tab.Length(k), "file", d.DataPath(), "error", why)
	// Durable at once: a power loss between the new bytes and the next sync
	// would else bring back the old bytes together with their bit.
	err := d.pres.Persist(d.bitmap, true)
	if err == nil && wasComplete {
		err = d.writeHeader(false)
	}
	if err == nil {
		err = disk.Sync(d.bitmap)
	}
	if err != nil {
		d.bitmapFailed(err)
	}
	if d.c.cfg.Damaged != nil {
		d.c.cfg.Damaged(d.id)
	}
}

// store writes a chunk that has been checked, if there is room for it, and says
// that it is present.
func (d *local) store(i int, data []byte, u room.Use) error {
	n := d.c.room.Blocks(d.tab.Start(i), int64(len(data)))
	if err := d.c.room.Try(&d.share, n, u); err != nil {
		if u == room.ForDemand && !errors.Is(err, room.ErrCounting) { // what stops prefetch, Prefetch says itself
			err = d.c.room.Failed(d.id, err)
		}
		return err
	}
	_, err := d.data.WriteAt(data, d.tab.Start(i))
	d.c.room.Wrote(&d.share, n)
	if err != nil {
		return d.c.room.Failed(d.id, fmt.Errorf("write %d bytes at %d to %s: %w", len(data), d.tab.Start(i), d.DataPath(), err))
	}
	d.c.room.Worked(len(data))
	d.added(i)
	return nil
}

// added says that chunk i is in the data file.
func (d *local) added(i int) {
	unsynced := d.pres.Add(i)
	d.persist()
	if unsynced >= d.c.cfg.SyncBytes {
		d.c.kick()
	}
}

// persist takes changed bits to the bitmap file. A failure costs at worst
// fetching chunks again; the next sync tries again.
func (d *local) persist() {
	if err := d.pres.Persist(d.bitmap, false); err != nil {
		d.bitmapFailed(err)
	}
}

func (d *local) bitmapFailed(err error) {
	if d.bitmapBad.CompareAndSwap(false, true) {
		d.c.cfg.Log.Error("cannot write the bitmap of a diff; after a restart some of its chunks are fetched again", "diff", d.id, "error", err)
	}
}

func roundUp(n int64) int64 { return (n + dataAlign - 1) &^ (dataAlign - 1) }

// header is what the bitmap file begins with.
func (d *local) header(complete bool) presence.Header {
	return presence.Header{
		Complete: complete, DiffID: d.id, Index: d.sum, Boot: d.c.boot,
		DiffSize: d.tab.Size, Chunks: uint32(d.tab.Len()),
	}
}

func (d *local) writeHeader(complete bool) error {
	h := d.header(complete)
	_, err := d.bitmap.WriteAt(h.Encode(), 0)
	return err
}

func (d *local) closeFiles() error {
	return errors.Join(d.data.Close(), d.bitmap.Close())
}

// encodedIndex reads the index as it came.
func (d *local) encodedIndex() ([]byte, error) {
	enc, err := os.ReadFile(d.path(indexFile))
	if err != nil {
		return nil, fmt.Errorf("index of diff %v: %w", d.id, err)
	}
	if blockdev.Sum(enc) != d.sum {
		return nil, fmt.Errorf("index of diff %v has changed on disk since it was opened: %w", d.id, blockdev.ErrCorrupt)
	}
	return enc, nil
}
