package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/prefetch"
)

// scrubFile says by its modification time when everything was last checked.
const scrubFile = "scrubbed"

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
	if err := d.enter(); err != nil {
		return res, fmt.Errorf("check of diff %v: %w", d.id, err)
	}
	defer d.wg.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(d.life, func() { cancel(context.Cause(d.life)) })()

	buf := d.c.buffer()
	defer d.c.buffers.Put(buf)
	rate := int64(scrubRate)
	if hurry {
		rate = 0
	}
	r := prefetch.NewRest(&d.c.pace.Gate, hurry, rate)
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
	d.noteScrub()
	return res, nil
}

// Scrubbed returns when all that was here was last checked; zero: not that anybody
// knew.
func (d *Diff) Scrubbed() time.Time { return time.Unix(0, d.scrubbed.Load()) }

func (d *Diff) scrubPath() string { return filepath.Join(d.dir, scrubFile) }

// noteScrub is for all that was checked just now. If it cannot be written down, it
// is done again.
func (d *Diff) noteScrub() {
	now := time.Now()
	d.scrubbed.Store(now.UnixNano())
	f, err := os.OpenFile(d.scrubPath(), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return
	}
	_ = f.Close()
	_ = os.Chtimes(d.scrubPath(), now, now)
}

func (d *Diff) loadScrub() {
	if st, err := os.Stat(d.scrubPath()); err == nil {
		d.scrubbed.Store(st.ModTime().UnixNano())
	}
}

// forgetScrub makes a scrub due.
func (d *Diff) forgetScrub() {
	if err := os.Remove(d.scrubPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.c.cfg.Log.Warn("cannot remove the record of a scrub; the diff is scrubbed later than it should be", "diff", d.id, "error", err)
	}
}

// Chunk returns the bytes of a chunk, or of a piece of a header stream, that some
// diff on this disk has, checked just now: for those who pass it on. buf has room
// for blockdev.MaxChunk bytes, and what is returned lies in it. The error wraps
// blockdev.ErrNotFound if no diff has it, or none has it undamaged; what was found
// damaged is missing from then on.
func (c *Cache) Chunk(digest blockdev.Digest, buf []byte) ([]byte, error) {
	if len(buf) < blockdev.MaxChunk {
		return nil, fmt.Errorf("chunk %v: a buffer of %d bytes", digest, len(buf))
	}
	for {
		d, i := c.lookup(&digest)
		if d == nil {
			break
		}
		b := buf[:d.tab.Length(i)]
		if err := d.verify(i, b); err == nil {
			return b, nil
		} else if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrIncomplete) {
			return nil, fmt.Errorf("chunk %v: %w: %w", digest, blockdev.ErrNotFound, err)
		}
	}
	for _, d := range *c.list.Load() {
		if b, ok := d.readPiece(&digest, func(int) []byte { return buf }); ok {
			return b, nil
		}
	}
	return nil, fmt.Errorf("chunk %v on this disk: %w", digest, blockdev.ErrNotFound)
}
