package store

import (
	"errors"
	"sync/atomic"
	"time"
)

const (
	// defaultIdle is how long after the last ingest chunks are compressed: a node that
	// has waited for it starts containers now, perhaps on this machine, and a processor
	// that computes on one of its threads is slower on the other.
	defaultIdle = 10 * time.Second
	// servedPart of that is how long no chunk must have been served before.
	servedPart = 10
	// stepBytes of raw chunks are compressed between two looks at whether a node is served.
	// On one core that takes about 50 ms.
	stepBytes = 8 << 20
	// runBytes of raw chunks go to one new pack: a sync and a transaction for
	// each are little beside the compression, and a crash loses little work.
	runBytes = 64 << 20
	// retryAfter a run that failed, or found no room.
	retryAfter = time.Minute
)

// recompressor makes the store smaller: it compresses in the background what ingests have
// stored raw.
type recompressor struct {
	s    *Store
	comp *compressor
	due  atomic.Int64  // raw bytes of chunks that are still to be compressed
	wake chan struct{} // to look again

	served atomic.Int64 // when the last call of Store.Chunk was, in Unix nanoseconds
}

func newRecompressor(s *Store) (*recompressor, error) {
	comp, err := newCompressor()
	return &recompressor{s: s, comp: comp, wake: make(chan struct{}, 1)}, err
}

func (c *recompressor) close() error { return c.comp.close() }

// run compresses until the store is closed. It is the only goroutine that does.
func (c *recompressor) run() {
	r := newRun(c.s)
	defer r.drop()
	var last, retry time.Time // when the last step ended; not before
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		var timer <-chan time.Time
		at, ok := c.next(last, retry)
		if ok {
			if d := time.Until(at); d > 0 {
				t.Reset(d)
				timer, ok = t.C, false
			}
		}
		if !ok {
			select {
			case <-c.s.stop:
				return
			case <-c.wake:
			case <-timer:
			}
			if c.s.sessions.any() && !r.empty() {
				// The ingest may need the room that this gives back.
				if err := r.commit(); err != nil {
					retry = c.failed(r, err)
				}
			}
			continue
		}
		more, err := r.step()
		if c.s.stopping() {
			return
		}
		if err == nil && (!more || r.raw >= c.s.cfg.runBytes || c.s.sessions.any()) {
			err = r.commit()
		}
		if err != nil {
			retry = c.failed(r, err)
		}
		last = time.Now()
	}
}

// next returns when the next step may begin. False: not before an ingest ends.
func (c *recompressor) next(last, retry time.Time) (time.Time, bool) {
	ingests, ended := c.s.sessions.count()
	if ingests > 0 || c.due.Load() == 0 {
		return time.Time{}, false
	}
	// While chunks are served all the time, one step in a while.
	at := time.Unix(0, c.served.Load())
	if last.Before(at) {
		at = last
	}
	at = at.Add(c.s.cfg.Idle / servedPart)
	if t := ended.Add(c.s.cfg.Idle); t.After(at) {
		at = t
	}
	if retry.After(at) {
		at = retry
	}
	return at, true
}

// failed gives a run up and returns when to try again.
func (c *recompressor) failed(r *run, err error) time.Time {
	r.drop()
	switch {
	case errors.Is(err, errNoRoom):
		c.s.cfg.Log.Info("store: not enough room to compress chunks; trying again later", "key", c.s.cfg.QuotaKey)
	case !errors.Is(err, ErrClosed) && !errors.Is(err, errNothing):
		c.s.cfg.Log.Warn("store: cannot compress chunks; trying again later", "error", err)
	}
	return time.Now().Add(retryAfter)
}

// wakeUp makes run look again.
func (c *recompressor) wakeUp() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}
