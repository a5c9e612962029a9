package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// Local reports whether every byte of [off, off+n) is synced, and returns the file that
// has them at the same offsets. It takes no lock (but for chunks that a Recording sees
// for the first time) and makes no system call. The range may reach into the zeros behind
// the diff, up to Size. What is present and not synced is for ReadLocal, which looks at
// what the kernel gives for it (lost.go).
//
// The file stays open until the diff is removed or the Cache closed. Use it
// through ReadAt or SyscallConn, which keep the descriptor from being closed
// meanwhile; Fd does not. Do not write to it.
func (d *Diff) Local(off int64, n int) (*os.File, bool) {
	return d.data, d.has(off, n, d.pres.SyncedAll)
}

// ReadLocal fills p from off on if every byte is present, and reports whether it has. It
// waits for nothing but the disk.
func (d *Diff) ReadLocal(p []byte, off int64) bool {
	return d.has(off, len(p), d.pres.HasAll) && d.pread(p, off) == nil
}

// has asks all about the chunks [lo, hi) of a range.
func (d *Diff) has(off int64, n int, all func(lo, hi int) bool) bool {
	if off < 0 || n < 0 || int64(n) > d.size-off {
		return false
	}
	tr := d.track.Load()
	if tr == nil && d.complete.Load() {
		return true
	}
	lo, hi := d.tab.Span(off, off+int64(n))
	if tr != nil {
		tr.touch(lo, hi)
	}
	return all(lo, hi)
}

// ReadAt reads as io.ReaderAt does, out of Size bytes. It is a demand read: what
// is missing is fetched, and asked for again until Config.Timeout is over. Its
// errors name the diff and the offset and wrap the cause: the Source's error,
// blockdev.ErrUnavailable if it did not answer in time, ErrRemoved, ErrClosed, or
// ctx's.
func (d *Diff) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if n := int64(len(p)); off >= 0 && d.has(off, len(p), d.pres.HasAll) && n > 0 {
		if err := d.pread(p, off); err == nil {
			return len(p), nil
		} else if errors.Is(err, os.ErrClosed) {
			return 0, d.readError(off, len(p), d.flights.why())
		}
		// pread has noted what cannot be read, so it is missing now.
	}
	return d.Read(ctx, off, len(p), given(p))
}

// given is memory that the reader has already.
type given []byte

func (g given) Take(_ context.Context, n int, _ blockdev.Origin) ([]byte, error) { return g[:n], nil }
func (given) Give()                                                              {}

// Read is ReadAt of n bytes into memory that it takes from m when all of them are at
// hand.
func (d *Diff) Read(ctx context.Context, off int64, n int, m blockdev.Memory) (int, error) {
	if off < 0 || n < 0 {
		return 0, fmt.Errorf("diff %v: read of %d bytes at offset %d", d.id, n, off)
	}
	if off >= d.size {
		return 0, io.EOF
	}
	var eof error
	if int64(n) > d.size-off {
		n, eof = int(d.size-off), io.EOF
	}
	var err error
	if d.has(off, n, d.pres.HasAll) {
		var ok bool
		if ok, err = d.take(ctx, off, n, nil, m); ok {
			return n, eof
		}
	}
	if err == nil {
		err = d.readMissing(ctx, off, n, m)
	}
	if err != nil {
		return 0, d.readError(off, n, err)
	}
	return n, eof
}

// readMissing waits for what is missing and then reads all.
func (d *Diff) readMissing(parent context.Context, off int64, n int, m blockdev.Memory) (err error) {
	d.c.pace.Gate.Enter(&d.flights.reading)
	defer d.c.pace.Gate.Leave(&d.flights.reading)
	d.c.stats.missed.Add(1)
	began := time.Now()
	defer func() { d.c.stats.waited.Add(int64(time.Since(began))) }()
	ctx, cancel := context.WithTimeoutCause(parent, d.c.cfg.Timeout, errTimeout)
	defer cancel()
	var mem unwritten
	defer mem.drop(d)
	for {
		ok, err := d.gather(ctx, off, n, &mem)
		if ok && err == nil {
			ok, err = d.take(ctx, off, n, &mem, m)
		}
		if !ok && err == nil && ctx.Err() != nil {
			err = d.flights.lateErr(ctx, nil)
		}
		if err != nil {
			// A caller's deadline is a failure, too; a caller that has gone is none.
			if !errors.Is(parent.Err(), context.Canceled) && !errors.Is(err, ErrRemoved) && !errors.Is(err, ErrClosed) {
				d.c.stats.failed.Add(1)
			}
			return err
		}
		if ok {
			return nil
		}
		// A chunk went again: again. The context's deadline ends this.
	}
}

// gather returns when all chunks of a range are present or in mem, and false if it
// has dropped what was in mem.
func (d *Diff) gather(ctx context.Context, off int64, n int, mem *unwritten) (bool, error) {
	for done := 0; done < n; {
		part := min(n-done, int(min(d.c.cfg.RequestBytes, math.MaxInt32)))
		lo, hi := d.tab.Span(off+int64(done), off+int64(done+part))
		if ok, err := d.waitPart(ctx, lo, hi, mem); !ok || err != nil {
			return false, err
		}
		done += part
	}
	return true, nil
}

// take takes memory for a range whose chunks are at hand and reads it. It returns false
// if one of them is not there any more.
func (d *Diff) take(ctx context.Context, off int64, n int, mem *unwritten, m blockdev.Memory) (bool, error) {
	from := blockdev.FromLocal
	if mem != nil {
		from = mem.from
	}
	p, err := m.Take(ctx, n, from)
	if err != nil {
		if errors.Is(context.Cause(ctx), errTimeout) {
			err = d.flights.lateErr(ctx, nil)
		}
		return false, err
	}
	ok, err := d.assemble(p, off, mem)
	if !ok && err == nil {
		m.Give()
	}
	return ok, err
}

func (d *Diff) readError(off int64, n int, err error) error {
	return fmt.Errorf("diff %v: read of %d bytes at offset %d: %w", d.id, n, off, err)
}

// heldBytes bounds what reads hold of chunks that could not be written, while they wait
// for others; shared among diffs.
const heldBytes = 32 << 20

// unwritten is what one read has of chunks that could not be written, by number, and
// the farthest place that one of its chunks has come from. The zero value is empty.
type unwritten struct {
	chunks map[int][]byte
	bytes  int64
	from   blockdev.Origin
}

func (u *unwritten) get(i int) []byte {
	if u == nil {
		return nil
	}
	return u.chunks[i]
}

// hold takes a chunk; it returns false if that would be more than the diff's reads may
// hold.
func (u *unwritten) hold(d *Diff, i int, b []byte) bool {
	if u.chunks[i] != nil {
		return true
	}
	if !d.c.held.Try(d.id, int64(len(b))) {
		return false
	}
	if u.chunks == nil {
		u.chunks = make(map[int][]byte)
	}
	u.chunks[i] = b
	u.bytes += int64(len(b))
	return true
}

func (u *unwritten) drop(d *Diff) {
	if u.bytes > 0 {
		d.c.held.Give(d.id, u.bytes)
		*u = unwritten{from: u.from}
	}
}

// waitPart waits for chunks [lo, hi), which one request may fetch. It returns false if
// it has dropped mem, to make room: then the read begins again.
func (d *Diff) waitPart(ctx context.Context, lo, hi int, mem *unwritten) (bool, error) {
	for {
		waits, err := d.flights.join(lo, hi, mem.chunks)
		if err != nil || len(waits) == 0 {
			return err == nil, err
		}
		err = d.flights.await(ctx, waits)
		full := false
		for _, w := range waits {
			b, from := w.outcome()
			mem.from = max(mem.from, from)
			if b != nil && !mem.hold(d, w.chunk, b) {
				full = true
			}
		}
		if err != nil {
			return false, err
		}
		if full {
			mem.drop(d)
			select {
			case <-time.After(firstBackoff):
			case <-ctx.Done():
			}
			return false, nil
		}
		// Another's flight failed, or a chunk went again: again. The
		// context's deadline ends this.
		if ctx.Err() != nil && !d.atHand(lo, hi, mem) {
			return false, d.flights.lateErr(ctx, nil)
		}
	}
}

// atHand reports whether chunks [lo, hi) are present or in mem.
func (d *Diff) atHand(lo, hi int, mem *unwritten) bool {
	for i := lo; i < hi; i++ {
		if !d.pres.Has(i) && mem.get(i) == nil {
			return false
		}
	}
	return true
}

// assemble fills p from the data file and mem. It returns false if a chunk is in
// neither.
func (d *Diff) assemble(p []byte, off int64, mem *unwritten) (bool, error) {
	lo, hi := d.tab.Span(off, off+int64(len(p)))
	if mem == nil || mem.bytes == 0 {
		if !d.pres.HasAll(lo, hi) {
			return false, nil
		}
		return d.assembled(d.pread(p, off))
	}
	for i := lo; i < hi; i++ {
		from, to := d.overlap(i, off, len(p))
		dst := p[from-off : to-off]
		if b := mem.get(i); b != nil {
			copy(dst, b[from-d.tab.Start(i):])
			continue
		}
		if !d.pres.Has(i) {
			return false, nil
		}
		if ok, err := d.assembled(d.pread(dst, from)); !ok {
			return false, err
		}
	}
	if tail := d.tab.Size - off; tail < int64(len(p)) {
		clear(p[max(tail, 0):])
	}
	return true, nil
}

// assembled judges pread's error: only a closed file is final.
func (d *Diff) assembled(err error) (bool, error) {
	if errors.Is(err, os.ErrClosed) {
		return false, d.flights.why()
	}
	return err == nil, nil
}
