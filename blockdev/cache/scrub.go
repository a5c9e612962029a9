package cache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev/cache/internal/prefetch"
)

// scrubRate bounds, in bytes per second, how fast a scrub reads.
const scrubRate = 32 << 20

// Scrub reads all that is here of the diff and checks it, slowly: it waits for
// demand reads, rests for as long as it has worked, and reads 32 MiB a second at
// most. What is damaged counts as missing from then on; the error wraps ErrDamaged
// then, and says how much that is. It wraps ErrIncomplete if nothing is damaged, but
// the diff was complete before and is not now: what is missing was damaged earlier.
func (d *Diff) Scrub(ctx context.Context) error {
	_, err := d.Check(ctx, false)
	return err
}

// Checked is what Check has looked at.
type Checked struct {
	Chunks, Damaged int
	Bytes           int64
	// Missing chunks were not looked at.
	Missing int
}

// Check is Scrub, as fast as it can with hurry, but still behind demand reads.
func (d *Diff) Check(ctx context.Context, hurry bool) (res Checked, err error) {
	ctx, leave, err := d.flights.enter(ctx)
	if err != nil {
		return res, fmt.Errorf("check of diff %v: %w", d.id, err)
	}
	defer leave()

	buf := d.c.buffer()
	defer d.c.buffers.Put(buf)
	rate := int64(scrubRate)
	if hurry {
		rate = 0
	}
	r := prefetch.NewRest(&d.c.pace.Gate, func() bool { return hurry }, rate)
	first := -1
	for i := range d.tab.Len() {
		n := d.tab.Length(i)
		if err := r.Wait(ctx, n); err != nil {
			return res, fmt.Errorf("check of diff %v: %w", d.id, err)
		}
		switch err := d.verify(i, buf[:n]); {
		case err == nil:
			res.Chunks++
			res.Bytes += int64(n)
		case errors.Is(err, ErrDamaged):
			res.Chunks++
			if res.Damaged++; first < 0 {
				first = i
			}
		case errors.Is(err, ErrIncomplete):
			res.Missing++
		default:
			return res, fmt.Errorf("check of diff %v: %w", d.id, err)
		}
	}
	if res.Damaged > 0 {
		return res, fmt.Errorf("diff %v: %w: %d of %d chunks, the first at offset %d", d.id, ErrDamaged, res.Damaged, res.Chunks, d.tab.Start(first))
	}
	if res.Missing > 0 && d.Completed() {
		return res, fmt.Errorf("diff %v: %w: it was complete before, and %d of %d chunks are missing", d.id, ErrIncomplete, res.Missing, d.tab.Len())
	}
	d.scrubbed.now()
	return res, nil
}

// Scrubbed returns when all that was here was last checked; zero: not that anybody
// knew.
func (d *Diff) Scrubbed() time.Time { return time.Unix(0, d.scrubbed.at.Load()) }
