package store

import (
	"errors"
	"time"
)

const (
	// defaultIdle is how long after the last ingest chunks are compressed: who has
	// waited for it starts containers now, perhaps on this machine, and a processor
	// that computes on one of its threads is slower on the other.
	defaultIdle = 10 * time.Second
	// servedPart of that is how long no chunk must have been served before.
	servedPart = 10
	// stepBytes of raw chunks are compressed between two looks at who is served.
	// On one core that takes about 50 ms.
	stepBytes = 8 << 20
	// runBytes of raw chunks go to one new pack: a sync and a transaction for
	// each are little beside the compression, and a crash loses little work.
	runBytes = 64 << 20
	// retryAfter a run that failed, or found no room.
	retryAfter = time.Minute
)

// recompress compresses in the background what ingests have stored raw. It is
// the only goroutine that does.
func (s *Store) recompress() {
	r := newRun(s)
	defer r.drop()
	var last, retry time.Time // when the last step ended; not before
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		var timer <-chan time.Time
		at, ok := s.compressAt(last, retry)
		if ok {
			if d := time.Until(at); d > 0 {
				t.Reset(d)
				timer, ok = t.C, false
			}
		}
		if !ok {
			select {
			case <-s.stop:
				return
			case <-s.wake:
			case <-timer:
			}
			if s.ingesting() && !r.empty() {
				// The ingest may need the room that this gives back.
				if err := r.commit(); err != nil {
					retry = s.recompressFailed(r, err)
				}
			}
			continue
		}
		more, err := r.step()
		if s.stopping() {
			return
		}
		if err == nil && (!more || r.raw >= s.cfg.runBytes || s.ingesting()) {
			err = r.commit()
		}
		if err != nil {
			retry = s.recompressFailed(r, err)
		}
		last = time.Now()
	}
}

// compressAt returns when the next step may begin. False: not before an ingest
// ends.
func (s *Store) compressAt(last, retry time.Time) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.sessions) > 0 || s.due == 0 {
		return time.Time{}, false
	}
	// While chunks are served all the time, one step in a while.
	at := time.Unix(0, s.served.Load())
	if last.Before(at) {
		at = last
	}
	at = at.Add(s.cfg.Idle / servedPart)
	if t := s.ingested.Add(s.cfg.Idle); t.After(at) {
		at = t
	}
	if retry.After(at) {
		at = retry
	}
	return at, true
}

// recompressFailed gives a run up and returns when to try again.
func (s *Store) recompressFailed(r *run, err error) time.Time {
	r.drop()
	switch {
	case errors.Is(err, errNoRoom):
		s.cfg.Log.Info("store: no room to compress chunks in; will try again", "key", s.cfg.QuotaKey)
	case !errors.Is(err, ErrClosed) && !errors.Is(err, errNothing):
		s.cfg.Log.Warn("store: chunks not compressed; will try again", "error", err)
	}
	return time.Now().Add(retryAfter)
}

func (s *Store) ingesting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions) > 0
}

func (s *Store) stopping() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
}

// wakeUp makes recompress look again.
func (s *Store) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}
