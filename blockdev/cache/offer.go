package cache

import (
	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

// Offer takes a chunk that nobody has asked for but that has come by, if it is
// missing and there is room that prefetch may use. It is checked as any other.
func (d *Diff) Offer(chunk blockdev.Digest, data []byte) {
	if d.enter() != nil {
		return // removed or closed
	}
	defer d.wg.Done()
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
		d.mu.Lock()
		f := d.flights[i]
		d.mu.Unlock()
		if f != nil {
			d.finish(f, nil, nil)
		}
	}
}
