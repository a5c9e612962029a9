package fusefs

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/turns"
)

const (
	// maxLine bounds the reads that wait for missing bytes, shared among diffs as
	// package turns does it. Each costs some hundred bytes here.
	maxLine = 1 << 16
	// maxActive bounds those of them that have a goroutine, shared in the same way; the
	// others wait for one of the same diff to end. leastActive is what each diff may
	// always have.
	maxActive, leastActive = 4096, 16
)

// slowRead is a read of which not all bytes are local.
type slowRead struct {
	readIn
	slot     slot // has the request until it is answered
	id       blockdev.Digest
	file     File
	n        int // bytes to answer
	deadline time.Time
	second   bool // try, of the kernel's
	began    time.Time
}

// slowReads answers reads that have to wait, in goroutines of their own. A read that
// waits for its bytes has no memory for its answer: it takes that when they are here.
// What a read may hold while its bytes do not come is shared among diffs, so that no
// diff waits for another.
type slowReads struct {
	s *Server
	// line and active count reads, memory the bytes of buffers: it goes to the read that
	// comes first, since it is held for one copy only.
	line, active *turns.Turns
	memory       *semaphore.Weighted

	mu      sync.Mutex
	tasks   sync.WaitGroup
	stopped bool
	began   map[uint64]time.Time // of all that are waiting, by the request's number
}

func newSlowReads(s *Server, memory int64) *slowReads {
	return &slowReads{
		s: s, line: turns.New(maxLine, 1), active: turns.New(maxActive, leastActive),
		memory: semaphore.NewWeighted(memory), began: make(map[uint64]time.Time),
	}
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
	if q.stopped {
		return errStopped
	}
	if !q.line.Try(r.id, 1) {
		return errLineFull
	}
	q.began[r.unique] = r.began
	// Reads of a diff that wait for a goroutine have later deadlines than those that
	// have one, so there is always one in time to fail them.
	q.active.Start(r.id, 1, func() { q.tasks.Go(func() { q.answer(ctx, r) }) })
	return nil
}

func (q *slowReads) answer(ctx context.Context, r slowRead) {
	if q.s.answerSlow(ctx, r) {
		q.s.pending.give(r.slot)
	}
	q.mu.Lock()
	delete(q.began, r.unique)
	q.mu.Unlock()
	q.line.Give(r.id, 1)
	q.active.Give(r.id, 1)
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
// done so for at least that long. The age of a read that an earlier server has left
// begins when this one got it.
func (s *Server) Waiting(ages ...time.Duration) []int { return s.slow.waiting(ages) }

// Uses returns the reads that wait for missing bytes, and those of them that have a
// goroutine (waiting: reads that have none yet).
func (s *Server) Uses() (line, active blockdev.Use) { return s.slow.line.Use(), s.slow.active.Use() }

// Failed returns how many reads were answered with EIO.
func (s *Server) Failed() int64 { return s.failed.Load() }

// stop waits for all reads, whose context has ended.
func (q *slowReads) stop() {
	q.mu.Lock()
	q.stopped = true
	q.mu.Unlock()
	q.tasks.Wait() // each starts the next of its line before it ends
}

// answerSlow reads and answers. It leaves the read unanswered, and returns false, if
// Serve has been told to stop.
func (s *Server) answerSlow(ctx context.Context, r slowRead) bool {
	ctx, cancel := context.WithDeadlineCause(ctx, r.deadline, errTimeout)
	defer cancel()
	m := answerMemory{s: s, n: r.n}
	defer m.Give()
	n, err := r.file.Read(ctx, r.off, r.n, &m)
	if err = slowEnd(r, m.payload(r.n), n, err); err == nil {
		s.answer(r.unique, m.b, r.n)
		s.opts.Observe(m.from, time.Since(r.began))
		return true
	}
	cause := context.Cause(ctx)
	switch {
	case cause == nil:
	case errors.Is(cause, errTimeout):
		err = errors.Join(cause, err)
	default:
		return false // stopped: the next process will answer
	}
	s.tries.note(r, time.Now()) // before the kernel learns of it
	s.failRead(r.id, r.readIn, err)
	return true
}

// answerMemory is the memory for one answer.
type answerMemory struct {
	s *Server
	n int // bytes of payload, with the zeros behind the file's content
	b *buffer
	// from is the farthest place of the read's bytes.
	from blockdev.Origin
}

// Take waits until there is room among the answers that are being copied.
func (m *answerMemory) Take(ctx context.Context, n int, from blockdev.Origin) ([]byte, error) {
	m.from = from
	if err := m.s.slow.memory.Acquire(ctx, int64(bufferSize(m.n))); err != nil {
		return nil, context.Cause(ctx)
	}
	m.b = m.s.buffers.get(m.n)
	return m.b.payload(n), nil
}

// Give does nothing if there is nothing to give back.
func (m *answerMemory) Give() {
	if m.b == nil {
		return
	}
	size := int64(m.b.size())
	m.s.buffers.put(m.b)
	m.b = nil
	m.s.slow.memory.Release(size)
}

// payload is what was taken, with room for n bytes; nil if nothing was.
func (m *answerMemory) payload(n int) []byte {
	if m.b == nil {
		return nil
	}
	return m.b.payload(n)
}
