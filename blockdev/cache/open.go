package cache

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/blockdev/cache/internal/table"
	"github.com/shoalfs/shoal/internal/durable"
)

// openDiff opens the diff in dir. An error that wraps ErrCorrupt means that it
// cannot be used and should be dropped.
func (c *Cache) openDiff(f folder) (*Diff, error) {
	done := func() {}
	ix, sum, tab, err := f.index(func(enc []byte) (ix *blockdev.Index, err error) {
		var free func()
		if ix, free, err = c.decode(c.life, enc); err == nil {
			done = free
		}
		return ix, err
	})
	var d *Diff
	if err == nil {
		d, err = c.newDiff(f, sum, ix, tab)
	}
	done() // the proof may need memory for an index of its own
	if err != nil {
		return nil, err
	}
	if err := d.loadProof(); err != nil {
		return nil, errors.Join(err, d.closeFiles())
	}
	return d, nil
}

// newDiff opens the files of a diff whose index has been read.
func (c *Cache) newDiff(f folder, sum blockdev.Digest, ix *blockdev.Index, tab *table.Table) (*Diff, error) {
	d := &Diff{heads: newHeaders(ix), prefetching: make(chan struct{}, 1), proving: make(chan struct{}, 1)}
	l := &d.local
	*l = local{
		folder: f, c: c.shared, sum: sum,
		tab: tab, pres: presence.New(f.id, tab.Len(), tab.Length), size: roundUp(tab.Size),
		syncing: make(chan struct{}, 1),
	}
	l.share.Measure = l.use
	err := l.openFiles(ix)
	if err == nil {
		err = c.room.Enter(&l.share)
	}
	if err != nil {
		for _, f := range []*os.File{l.data, l.bitmap} {
			if f != nil {
				_ = f.Close() // the first error is the one that tells
			}
		}
		return nil, err
	}
	d.flights = newFlights(l)
	d.scrubbed = newStamp(l.path(scrubFile)) // which an unclean end has removed
	return d, nil
}

func (d *local) openFiles(ix *blockdev.Index) error {
	err := d.fixMeta(d.path(metaFile), ix.Meta)
	if err != nil {
		return err
	}
	if d.data, err = os.OpenFile(d.DataPath(), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if d.bitmap, err = os.OpenFile(d.path(bitmapFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	return d.loadBitmap(ix)
}

// loadBitmap finds out which chunks are present. What of the file is not
// believed is suspect, and the file says so before it says that it belongs to
// this boot.
func (d *local) loadBitmap(ix *blockdev.Index) error {
	b := make([]byte, presence.FileSize(d.tab.Len())+1)
	n, err := io.ReadFull(d.bitmap, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	h, err := presence.Read(b[:n], presence.HeaderOf(ix, d.sum, d.c.boot))
	if errors.Is(err, presence.ErrIndex) {
		return err
	}
	size, serr := d.fixSize()
	if serr != nil {
		return serr
	}
	if err == nil && size != d.size {
		err = fmt.Errorf("data file has %d bytes, want %d: %w", size, d.size, blockdev.ErrCorrupt)
	}
	if err != nil {
		d.c.cfg.Log.Warn("cannot tell which chunks of a diff are on disk; each chunk is checked before it is used", "diff", d.id, "dir", d.dir, "error", err)
		d.pres.DoubtAll()
		h = presence.Header{}
		// What is checked must be what the disk has, so that the next sync means
		// something.
		if err := disk.Sync(d.data); err != nil {
			return err
		}
		disk.Drop(d.data, 0, 0)
		// No good record may survive under the new header.
		if err := d.bitmap.Truncate(0); err != nil {
			return err
		}
		if _, err := d.bitmap.WriteAt(make([]byte, presence.FileSize(d.tab.Len())), 0); err != nil {
			return err
		}
	} else if doubted := d.pres.Load(b[presence.HeaderSize:], d.believe(&h)); doubted > 0 {
		d.c.cfg.Log.Info("some chunks of a diff may be wrong since the last boot, or have damaged records; they are checked before they are used", "diff", d.id, "chunks", doubted)
	}
	if h.Boot != d.c.boot && d.c.unclean {
		// A scrub is due.
		if err := os.Remove(d.path(scrubFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
			d.c.cfg.Log.Warn("cannot remove the record of a scrub; the diff is scrubbed later than it should be", "diff", d.id, "error", err)
		}
	}
	// What complete promises about an old process' chunks holds for all or none.
	complete := h.Complete && d.pres.SyncedAll(0, d.tab.Len())
	d.completed.Store(h.Complete)
	if h.Boot == d.c.boot && complete == h.Complete {
		if complete {
			d.setComplete()
		}
		return d.pres.Persist(d.bitmap, true)
	}
	if err := d.pres.Persist(d.bitmap, true); err != nil {
		return err
	}
	if err := disk.Sync(d.bitmap); err != nil {
		return err
	}
	if err := d.writeHeader(complete); err != nil {
		return err
	}
	if complete {
		d.setComplete()
	}
	return nil
}

// believe says what of a bitmap whose header checks out is believed. After a
// machine that went down while the cache was open, nothing is that costs little to
// check on its first use. A complete diff is mounted natively, and read by nobody
// but the kernel: what was synced is believed there, and scrubbed soon.
func (d *local) believe(h *presence.Header) presence.Belief {
	switch {
	case h.Boot == d.c.boot:
		return presence.BelievePresent
	case d.c.unclean && !h.Complete:
		return presence.BelieveNone
	default:
		return presence.BelieveSynced
	}
}

// fixSize gives the data file its length, and returns the one it had.
func (d *local) fixSize() (int64, error) {
	var st unix.Stat_t
	if err := disk.Control(d.data, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, &os.PathError{Op: "stat", Path: d.DataPath(), Err: err}
	}
	if st.Size == d.size {
		return st.Size, nil
	}
	// What lies behind the diff must be zero, so it is cut off there first.
	if st.Size > d.tab.Size {
		if err := d.data.Truncate(d.tab.Size); err != nil {
			return 0, err
		}
	}
	return st.Size, d.data.Truncate(d.size)
}

// fixMeta makes a metadata image the one that its index has.
func (d *local) fixMeta(path string, meta []byte) error {
	same, err := disk.Is(path, meta)
	if err != nil || same {
		return err
	}
	d.c.cfg.Log.Warn("the metadata image of a diff is damaged; it is written again from the index", "diff", d.id, "file", path)
	return durable.Replace(path, meta, 0o600)
}

// loadProof finds out what is known of a diff's index. It fails if the cache is closed
// meanwhile.
func (d *Diff) loadProof() error {
	if d.c.quarantine.has(d.id, d.sum) {
		d.proof.Store(int32(Quarantined))
		return nil
	}
	rec, err := d.folder.proof()
	switch {
	case err == nil && rec.Index == d.sum:
		if rec.Own != (blockdev.Digest{}) {
			if err := d.loadOwn(rec.Own); d.c.life.Err() != nil {
				return ErrClosed
			} else if err != nil {
				d.c.cfg.Log.Warn("the tree that this node made of a layer is damaged; containers see the received tree until the layer is proven again", "diff", d.id, "error", err)
				return nil
			}
		}
		d.proof.Store(int32(Proven))
	case err != nil && !errors.Is(err, os.ErrNotExist):
		d.c.cfg.Log.Warn("the record of a layer's proof is damaged; the layer is proven again", "diff", d.id, "error", err)
	}
	return nil
}

// loadOwn shows the tree that was taken over, of which sum is on record.
func (d *Diff) loadOwn(sum blockdev.Digest) error {
	done := func() {}
	defer func() { done() }()
	ix, err := d.ownIndex(sum, func(enc []byte) (ix *blockdev.Index, err error) {
		var free func()
		if ix, free, err = d.c.decode(d.c.life, enc); err == nil {
			done = free
		}
		return ix, err
	})
	if err == nil {
		err = d.fixMeta(d.path(ownMetaFile), ix.Meta)
	}
	if err == nil {
		d.own.Store(&ownTree{sum: sum})
	}
	return err
}
