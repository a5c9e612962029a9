package ingest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	// fetchBuffer is how much is read from the network before it is written.
	fetchBuffer = 256 << 10
	// maxAttempts bounds the connections made for one layer, also where each of
	// them brings a little.
	maxAttempts = 1000
	// maxBackOff and maxRetryAfter bound a single pause.
	maxBackOff    = 10 * time.Second
	maxRetryAfter = 2 * time.Minute
)

var errStalled = errors.New("no byte has come")

// fetcher brings a blob into the spool file.
type fetcher struct {
	in    *Ingester
	l     Layer
	sf    *spoolFile
	t     *tail
	sum   hash.Hash
	at    int64           // bytes written and hashed
	broke bool            // the connection was made more than once
	fetch func(n int)     // told of every byte that has come over the network
	more  <-chan struct{} // has something if another caller's credential may help
}

// run ends the tail with io.EOF when the blob is complete and has its digest,
// else with the error that it returns.
func (f *fetcher) run(ctx context.Context) error {
	err := f.all(ctx)
	if err == nil {
		if got := blockdev.Digest(f.sum.Sum(nil)); got != f.l.Digest {
			err = fmt.Errorf("the registry sends a blob with digest %s instead: %w", got, blockdev.ErrCorrupt)
		}
	}
	if err != nil {
		f.t.end(err)
		return err
	}
	f.t.end(io.EOF)
	return nil
}

// all hashes what is in the spool file and fetches the rest, connecting again
// as often as it may.
func (f *fetcher) all(ctx context.Context) error {
	f.sum = sha256.New()
	n, err := io.Copy(f.sum, io.NewSectionReader(f.sf.f, 0, f.sf.length))
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	f.at = n
	buf := make([]byte, fetchBuffer)
	vain := 0 // attempts in a row that brought nothing
	for attempt := 1; f.at < f.l.Size; attempt++ {
		before := f.at
		err := f.attempt(ctx, buf)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var local localError
		if err == nil || (f.at == f.l.Size && !errors.As(err, &local)) {
			break // complete; how the connection ended does not matter
		}
		if vain++; f.at > before {
			vain = 0
		}
		if final(err) || (vain > 0 && errors.Is(err, blockdev.ErrCorrupt)) || vain > f.in.cfg.Retries || attempt >= maxAttempts {
			return fmt.Errorf("after %d of %d bytes and %d attempts: %w", f.at, f.l.Size, attempt, err)
		}
		f.in.stats.retries.Add(1)
		f.broke = true
		pause, ok := f.pause(err, vain)
		if !ok {
			return fmt.Errorf("after %d of %d bytes: the registry says to try again in %s: %w", f.at, f.l.Size, pause, err)
		}
		f.in.cfg.Log.Warn("layer download interrupted; it goes on from the same byte", "image", f.l.Ref, "layer", f.l.Digest,
			"at", f.at, "size", f.l.Size, "attempt", attempt, "pause", pause, "error", err)
		select {
		case <-time.After(pause):
		case <-f.more:
			vain = 0 // it has failed for others
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// localError is one of the spool, not of the registry: trying again is no use.
type localError struct{ error }

func (e localError) Unwrap() error { return e.error }

// final tells errors that another attempt does not cure.
func final(err error) bool {
	var local localError
	return errors.As(err, &local) || errors.Is(err, blockdev.ErrUnauthorized) || errors.Is(err, blockdev.ErrNotFound) ||
		errors.Is(err, blockdev.ErrUnsupported)
}

// pause is how long to wait before the next attempt; not ok: too long.
func (f *fetcher) pause(err error, vain int) (pause time.Duration, ok bool) {
	if d := retryAfter(err); d > 0 {
		return d, d <= maxRetryAfter
	}
	if vain == 0 {
		return 0, true // it brought something, so the registry is alive
	}
	d := min(f.in.cfg.BackOff<<min(vain-1, 16), maxBackOff)
	return d/2 + rand.N(d/2+1), true
}

// retryAfter is when a registry says to come back; 0: it does not say.
func retryAfter(err error) time.Duration {
	var r interface{ RetryAfter() time.Duration }
	if errors.As(err, &r) {
		return max(r.RetryAfter(), 0)
	}
	return 0
}

// attempt makes one connection and takes what it brings.
func (f *fetcher) attempt(ctx context.Context, buf []byte) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stall := time.AfterFunc(f.in.cfg.Stall, func() { cancel(errStalled) })
	defer stall.Stop()
	defer func() {
		if errors.Is(context.Cause(ctx), errStalled) {
			err = fmt.Errorf("%w for %s: %w", errStalled, f.in.cfg.Stall, blockdev.ErrUnavailable)
		}
	}()
	rc, err := f.l.Open(ctx, f.at)
	if err != nil {
		return err
	}
	// Close also ends a Read that does not look at the context.
	stop := context.AfterFunc(ctx, func() { rc.Close() })
	defer func() {
		if stop() {
			rc.Close() // nothing was written, so there is nothing to lose
		}
	}()
	for {
		n, rerr := fill(rc, buf, func() { stall.Reset(f.in.cfg.Stall) })
		if int64(n) > f.l.Size-f.at {
			return localError{fmt.Errorf("the registry sends more than the %d bytes that the manifest says: %w", f.l.Size, blockdev.ErrCorrupt)}
		}
		if n > 0 {
			if _, err := f.sf.f.WriteAt(buf[:n], f.at); err != nil {
				return localError{diskError(err)}
			}
			f.sum.Write(buf[:n]) // a hash.Hash never fails
			f.at += int64(n)
			f.t.grow(n)
			f.fetch(n)
		}
		switch {
		case errors.Is(rerr, io.EOF) && f.at == f.l.Size:
			return nil
		case errors.Is(rerr, io.EOF):
			return fmt.Errorf("the connection ended %d bytes early: %w", f.l.Size-f.at, blockdev.ErrUnavailable)
		case rerr != nil:
			return rerr
		}
	}
}

// fill reads until buf is at least half full: connections give some KiB at a
// time, and each write and hash of more costs less. alive is called after every
// read that brought something.
func fill(r io.Reader, buf []byte, alive func()) (n int, err error) {
	for n < len(buf) {
		k, err := r.Read(buf[n:])
		n += k
		if k > 0 {
			alive()
		}
		if err != nil {
			return n, err
		}
		if n >= len(buf)/2 {
			break
		}
	}
	return n, nil
}
