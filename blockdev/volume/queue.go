package volume

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// PrefetchState is what the queue does with a diff.
type PrefetchState uint8

// A diff is Idle before it has been asked for, and when it is complete.
const (
	Idle PrefetchState = iota
	Queued
	Running
	// Waiting: an attempt failed, the next one follows later.
	Waiting
)

func (s PrefetchState) String() string {
	return [...]string{"idle", "queued", "running", "waiting"}[s&3]
}

// Times between the attempts to prefetch one diff.
const (
	firstRetry = time.Second
	lastRetry  = 5 * time.Minute
)

// fetchState is the queue's note on one volume.
type fetchState struct {
	state   PrefetchState
	barred  bool // being removed: not to be queued again
	failed  int  // attempts in a row
	timer   *time.Timer
	cancel  context.CancelFunc // of the attempt that runs
	attempt *attempt           // queued or running
}

// attempt is one go at a diff, that any number of callers may wait for.
type attempt struct {
	done chan struct{}
	err  error // set before done is closed
}

// queue prefetches volumes in the order in which they came, a few at a time.
type queue struct {
	log   *slog.Logger
	most  int
	ctx   context.Context // ends with the queue: it is the queue's life, not a caller's
	end   context.CancelFunc
	tasks sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	line    []*volume
	running int
}

func newQueue(log *slog.Logger, most int) *queue {
	ctx, end := context.WithCancel(context.Background())
	return &queue{log: log, most: most, ctx: ctx, end: end}
}

// errRemoved ends an attempt whose diff is being removed.
var errRemoved = errors.New("the diff is being removed")

// add puts a volume in the line, or finds it there. With front it goes before
// all others. It returns what to wait for.
func (q *queue) add(v *volume, front bool) (*attempt, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.closed:
		return nil, errClosed
	case v.fetch.barred:
		return nil, errRemoved
	case v.fetch.state == Running:
		return v.fetch.attempt, nil
	case v.fetch.state == Queued && !front:
		return v.fetch.attempt, nil
	case v.fetch.state == Queued:
		q.unline(v)
	default: // Idle, or Waiting for a time that somebody now does not want to wait for
		q.stopTimer(v)
		v.fetch.attempt = &attempt{done: make(chan struct{})}
	}
	v.fetch.state = Queued
	if front {
		q.line = append([]*volume{v}, q.line...)
	} else {
		q.line = append(q.line, v)
	}
	q.next()
	return v.fetch.attempt, nil
}

func (q *queue) unline(v *volume) {
	for i, o := range q.line {
		if o == v {
			q.line = append(q.line[:i:i], q.line[i+1:]...)
			return
		}
	}
}

func (q *queue) stopTimer(v *volume) {
	if v.fetch.timer != nil {
		v.fetch.timer.Stop()
		v.fetch.timer = nil
	}
}

// next starts what may run. The caller holds the lock.
func (q *queue) next() {
	for q.running < q.most && len(q.line) > 0 && !q.closed {
		v := q.line[0]
		q.line = q.line[1:]
		q.running++
		ctx, cancel := context.WithCancel(q.ctx)
		v.fetch.state, v.fetch.cancel = Running, cancel
		q.tasks.Go(func() {
			defer cancel()
			q.finish(v, v.diff.Prefetch(ctx))
		})
	}
}

// finish notes how an attempt ended, and plans the next one if it failed.
func (q *queue) finish(v *volume, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running--
	a := v.fetch.attempt
	v.fetch.state, v.fetch.cancel, v.fetch.attempt = Idle, nil, nil
	switch {
	case err == nil:
		v.fetch.failed = 0
	case v.fetch.barred:
		err = errRemoved
	case q.closed:
		err = errClosed
	default:
		wait := min(firstRetry<<min(v.fetch.failed, 20), lastRetry)
		v.fetch.failed++
		v.fetch.state = Waiting
		v.fetch.timer = time.AfterFunc(wait, func() { q.again(v) })
		q.log.Warn("prefetch failed", "diff", v.id, "error", err, "next", wait)
	}
	a.err = err
	close(a.done)
	q.next()
}

// again is what a timer does.
func (q *queue) again(v *volume) {
	q.mu.Lock()
	waits := v.fetch.state == Waiting && v.fetch.timer != nil
	q.mu.Unlock()
	if waits {
		// It may have been added, barred or closed since; add knows.
		_, _ = q.add(v, false)
	}
}

// drop takes a volume out and keeps it out, and waits for the attempt under way
// to end. If ctx ends before, the volume is let in again.
func (q *queue) drop(ctx context.Context, v *volume) error {
	q.mu.Lock()
	v.fetch.barred = true
	q.stopTimer(v)
	a := v.fetch.attempt
	switch v.fetch.state {
	case Queued:
		q.unline(v)
		v.fetch.state, v.fetch.attempt = Idle, nil
		a.err = errRemoved
		close(a.done)
		a = nil
	case Running:
		v.fetch.cancel()
	default:
		v.fetch.state = Idle
	}
	q.mu.Unlock()
	if a == nil {
		return nil
	}
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		q.allow(v)
		return context.Cause(ctx)
	}
}

// allow undoes drop.
func (q *queue) allow(v *volume) {
	q.mu.Lock()
	defer q.mu.Unlock()
	v.fetch.barred = false
}

func (q *queue) state(v *volume) PrefetchState {
	q.mu.Lock()
	defer q.mu.Unlock()
	return v.fetch.state
}

// close ends everything and waits for it.
func (q *queue) close(all []*volume) {
	q.mu.Lock()
	q.closed = true
	for _, v := range all {
		q.stopTimer(v)
	}
	for _, v := range q.line {
		a := v.fetch.attempt
		v.fetch.state, v.fetch.attempt = Idle, nil
		a.err = errClosed
		close(a.done)
	}
	q.line = nil
	q.mu.Unlock()
	q.end()
	q.tasks.Wait()
}

// Prefetch fetches everything of these diffs in the background, in this order,
// behind what is queued already and behind the reads of the container that is
// about to start. Attempts that fail are repeated until they succeed or the diff
// is removed. Unknown and complete diffs are passed over.
func (m *Manager) Prefetch(ids ...blockdev.Digest) {
	m.cache.ExpectDemand()
	for _, id := range ids {
		v, err := m.volume(id)
		if err != nil || v.diff.Complete() {
			continue
		}
		// What add refuses is being removed or closed.
		_, _ = m.queue.add(v, false)
	}
}

// progressInterval is how often PrefetchWait reports.
const progressInterval = 200 * time.Millisecond

// PrefetchWait prefetches one diff before all that are queued, and returns when
// every byte of it is on this node, verified and synced. While it waits it calls
// progress (which may be nil) a few times a second, and once at the end, with
// the bytes that are here and all there are. If the attempt fails it returns the
// cause at once; the queue goes on trying. If ctx ends, the prefetch goes on.
func (m *Manager) PrefetchWait(ctx context.Context, id blockdev.Digest, progress func(local, total int64)) error {
	v, err := m.volume(id)
	if err != nil {
		return err
	}
	report := func() {
		if progress != nil {
			s := v.diff.Stat()
			progress(s.BytesPresent, s.Bytes)
		}
	}
	if !v.diff.Complete() {
		a, err := m.queue.add(v, true)
		if err != nil {
			return err
		}
		tick := time.NewTicker(progressInterval)
		defer tick.Stop()
		for done := false; !done; {
			select {
			case <-a.done:
				done = true
			case <-tick.C:
				report()
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if a.err != nil {
			return a.err
		}
	}
	report()
	return nil
}
