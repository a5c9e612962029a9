package fusefs

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// maxLine bounds the reads that wait for their turn in slowReads. Each costs
// less than 100 bytes here; the kernel holds the rest.
const maxLine = 1 << 16

// slowRead is a read of which not all bytes are local.
type slowRead struct {
	readIn
	slot     slot // has the request until it is answered
	id       blockdev.Digest
	file     File
	n        int // bytes to answer
	deadline time.Time
}

// slowReads answers reads that have to wait, in goroutines of their own. What
// bounds them is the memory for their answers.
type slowReads struct {
	s    *Server
	most int64 // bytes

	mu      sync.Mutex
	tasks   sync.WaitGroup
	stopped bool
	used    int64
	line    []slowRead
	head    int                  // line[:head] is done
	began   map[uint64]time.Time // of all that are waiting, by the request's number
}

var (
	errLineFull = errors.New("too many reads wait for missing bytes")
	errTimeout  = errors.New("read timeout: the missing bytes did not come in time")
)

// add takes a read over. It does not wait. If it returns an error, the read is
// still the caller's to answer.
func (q *slowReads) add(ctx context.Context, r slowRead) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.stopped:
		return errStopped
	case len(q.line)-q.head >= maxLine:
		return errLineFull
	}
	q.line = append(q.line, r)
	q.began[r.unique] = time.Now()
	q.next(ctx)
	return nil
}

// waiting counts the reads that have waited for at least each of ages.
func (q *slowReads) waiting(ages []time.Duration) []int {
	now := time.Now()
	n := make([]int, len(ages))
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, t := range q.began {
		for i, age := range ages {
			if now.Sub(t) >= age {
				n[i]++
			}
		}
	}
	return n
}

// Waiting returns, for each of ages, how many reads wait for missing bytes and have
// done so for at least that long.
func (s *Server) Waiting(ages ...time.Duration) []int { return s.slow.waiting(ages) }

// next starts those for which there is room. The caller holds the lock.
func (q *slowReads) next(ctx context.Context) {
	for q.head < len(q.line) && !q.stopped {
		r := q.line[q.head]
		if q.used+int64(r.n) > q.most {
			return // in order: small ones do not overtake
		}
		q.line[q.head] = slowRead{}
		q.head++
		if q.head == len(q.line) {
			q.line, q.head = q.line[:0], 0
		} else if q.head >= 1024 && q.head*2 >= len(q.line) {
			n := copy(q.line, q.line[q.head:])
			clear(q.line[n:])
			q.line, q.head = q.line[:n], 0
		}
		q.used += int64(r.n)
		q.tasks.Go(func() {
			if q.s.answerSlow(ctx, r) {
				q.s.pending.give(r.slot)
			}
			q.mu.Lock()
			defer q.mu.Unlock()
			q.used -= int64(r.n)
			delete(q.began, r.unique)
			q.next(ctx)
		})
	}
}

// stop drops what waits and waits for the rest, whose context has ended.
func (q *slowReads) stop() {
	q.mu.Lock()
	q.stopped = true
	q.line, q.head = nil, 0
	q.mu.Unlock()
	q.tasks.Wait()
}

// answerSlow reads and answers. It leaves the read unanswered, and returns false, if
// Serve has been told to stop.
func (s *Server) answerSlow(ctx context.Context, r slowRead) bool {
	ctx, cancel := context.WithDeadlineCause(ctx, r.deadline, errTimeout)
	defer cancel()
	b := s.buffers.get(r.n)
	defer s.buffers.put(b)
	p := b.payload(r.n)
	n, err := r.file.ReadAt(ctx, p, r.off)
	if err = slowEnd(r.file, r.off, p, n, err); err == nil {
		s.answer(r.unique, b, r.n)
		return true
	}
	cause := context.Cause(ctx)
	switch {
	case cause == nil:
	case errors.Is(cause, errTimeout):
		err = errors.Join(cause, err)
	default:
		return false // stopped: whoever comes next will answer
	}
	s.failRead(r.id, r.readIn, err)
	return true
}
