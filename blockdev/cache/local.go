package cache

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

// copyLocal gets what it can of flights from this disk. What it cannot get is
// left for the Source.
func (g *group) copyLocal(ctx context.Context, flights []*flight) {
	buf := g.d.c.buffer()
	defer g.d.c.buffers.Put(buf)
	for _, f := range flights {
		if ctx.Err() != nil {
			return
		}
		if !g.copyOne(f, buf[:g.d.tab.Length(f.chunk)]) {
			f.remote = true
		}
	}
}

func (g *group) copyOne(f *flight, buf []byte) bool {
	d := g.d
	digest := d.tab.Digest(f.chunk)
	if d.pres.IsSuspect(f.chunk) {
		_, err := d.data.ReadAt(buf, d.tab.Start(f.chunk))
		if err == nil && blockdev.Sum(buf) == digest {
			d.added(f.chunk)
			d.c.stats.copied.Add(int64(len(buf)))
			d.finish(f, nil, nil)
			return true
		}
		d.pres.Drop(f.chunk)
		d.persist()
	}
	for {
		o, k := d.c.lookup(&digest)
		if o == nil {
			return false
		}
		_, err := o.data.ReadAt(buf, o.tab.Start(k))
		switch {
		case errors.Is(err, os.ErrClosed):
			return false // o is being removed
		case err != nil:
			o.damaged(k, err)
		case blockdev.Sum(buf) != digest:
			o.damaged(k, blockdev.ErrCorrupt)
		default:
			d.c.stats.copied.Add(int64(len(buf)))
			o.Drop(o.tab.Start(k), len(buf))
			// The error of a full disk reaches who waits by the flight.
			_ = g.settle(blockdev.Demand, f, buf)
			return true
		}
	}
}

// lookup finds a diff that has a chunk with this digest, and its number there.
func (c *Cache) lookup(digest *blockdev.Digest) (*Diff, int) {
	for _, o := range *c.list.Load() {
		for _, k := range o.tab.Find(digest) {
			if o.pres.Has(int(k)) {
				return o, int(k)
			}
		}
	}
	return nil, 0
}

// damaged is called when a chunk that was thought present cannot be read, or
// does not have its digest. The chunk is missing from then on, and Config.Damaged
// sees to the rest.
func (d *Diff) damaged(k int, why error) {
	wasComplete := d.complete.Swap(false)
	if !d.pres.Drop(k) {
		return
	}
	d.c.stats.damaged.Add(1)
	d.c.cfg.Log.Error("a chunk on this disk is damaged; it is fetched again",
		"diff", d.id, "chunk", k, "offset", d.tab.Start(k), "bytes", d.tab.Length(k), "file", d.DataPath(), "cause", why)
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
func (d *Diff) store(i int, data []byte, u room.Use) error {
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
func (d *Diff) added(i int) {
	unsynced := d.pres.Add(i)
	d.persist()
	if unsynced >= d.c.cfg.SyncBytes {
		d.c.kick()
	}
}

// persist takes changed bits to the bitmap file. A failure costs at worst
// fetching chunks again; the next sync tries again.
func (d *Diff) persist() {
	if err := d.pres.Persist(d.bitmap, false); err != nil {
		d.bitmapFailed(err)
	}
}

func (d *Diff) bitmapFailed(err error) {
	if d.bitmapBad.CompareAndSwap(false, true) {
		d.c.cfg.Log.Error("cannot write the bitmap of a diff; after a restart some of its chunks are fetched again", "diff", d.id, "cause", err)
	}
}
