package cache

import (
	"context"
	"errors"
	"os"

	"github.com/shoalfs/shoal/blockdev"
)

// copyLocal gets what it can of flights from this disk. What it cannot get is
// left for the Source.
func (g *group) copyLocal(ctx context.Context, flights []*flight) {
	buf := g.fs.c.buffer()
	defer g.fs.c.buffers.Put(buf)
	for _, f := range flights {
		if ctx.Err() != nil {
			return
		}
		if !g.copyOne(f, buf[:g.fs.tab.Length(f.chunk)]) {
			f.remote = true
		}
	}
}

func (g *group) copyOne(f *flight, buf []byte) bool {
	d := g.fs
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
		switch err := o.readChunk(k, buf); {
		case err == nil:
			d.c.stats.copied.Add(int64(len(buf)))
			o.Drop(o.tab.Start(k), len(buf))
			// The flight gives the error of a full disk to the reads that wait.
			_ = g.settle(blockdev.Demand, f, buf)
			return true
		case errors.Is(err, os.ErrClosed):
			return false // o is being removed
		}
	}
}
