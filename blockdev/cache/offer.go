package cache

import (
	"context"
	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

// Offer takes a chunk that no reader has asked for but that has come by, if it is
// missing and there is room that prefetch may use. It is checked as any other.
func (d *Diff) Offer(chunk blockdev.Digest, data []byte) {
	_, leave, err := d.flights.enter(context.Background())
	if err != nil {
		return // removed or closed
	}
	defer leave()
	checked := false
	for _, k := range d.tab.Find(&chunk) {
		i := int(k)
		if d.pres.Has(i) || len(data) != d.tab.Length(i) {
			continue
		}
		if !checked && blockdev.Sum(data) != chunk {
			d.c.stats.corrupt.Add(1)
			return
		}
		checked = true
		if d.store(i, data, room.ForPrefetch) != nil {
			return // prefetch will say so
		}
		d.c.stats.fetched(blockdev.Prefetch, len(data))
		if f := d.flights.get(i); f != nil {
			d.flights.finish(f, nil, nil)
		}
	}
}
