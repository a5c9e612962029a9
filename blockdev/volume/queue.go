package volume

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// PrefetchState is what the prefetch queue does with a diff.
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
	// noSpaceRetry is for diffs that there is no room for: to see that costs nothing,
	// and when room is made they are to go on soon.
	noSpaceRetry = 10 * time.Second
)

// fetchState is a queue's note on one volume.
type fetchState struct {
	state   PrefetchState
	barred  bool // being removed: not to be queued again
	hurry   bool // somebody waits for it
	paused  bool // the attempt that runs has been cancelled by pause
	again   bool // and was wanted again after that
	failed  int  // attempts in a row
	noSpace bool // the last of them for lack of room
	timer   *time.Timer
	cancel  context.CancelFunc // of the attempt that runs
	attempt *attempt           // queued or running
}

// attempt is one go at a diff, that any number of callers may wait for.
type attempt struct {
	done chan struct{}
	err  error // set before done is closed
}

// task is what a queue does with its volumes.
type task struct {
	name string // for log lines
	// note is where a volume keeps this queue's state.
	note func(*volume) *fetchState
	// do is one attempt. hurry: somebody waits for it.
	do func(ctx context.Context, v *volume, hurry bool) error
	// hold says that only what somebody waits for may start now. It is called
	// with the queue's lock held.
	hold func() bool
	// final says of an error that there is to be no next attempt.
	final func(err error) bool
	// ended is called after each attempt, without the lock.
	ended func(v *volume, err error)
}

// queue does its task with volumes in the order in which they came, a few at a
// time.
type queue struct {
	task
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

func newQueue(log *slog.Logger, most int, t task) *queue {
	ctx, end := context.WithCancel(context.Background())
	return &queue{task: t, log: log, most: most, ctx: ctx, end: end}
}

// errRemoved ends an attempt whose diff is being removed.
var errRemoved = errors.New("the diff is being removed")

// add puts a volume in the line, or finds it there. With front it goes before
// all others. It returns what to wait for.
func (q *queue) add(v *volume, front bool) (*attempt, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.note(v)
	switch {
	case q.closed:
		return nil, errClosed
	case f.barred:
		return nil, errRemoved
	case f.state == Running:
		f.hurry = f.hurry || front
		f.again = f.paused
		return f.attempt, nil
	case f.state == Queued && !front:
		return f.attempt, nil
	case f.state == Queued:
		q.unline(v)
	default: // Idle, or Waiting for a time that somebody now does not want to wait for
		q.stopTimer(v)
		f.attempt = &attempt{done: make(chan struct{})}
	}
	f.state = Queued
	if front {
		f.hurry = true
		q.line = append([]*volume{v}, q.line...)
	} else {
		q.line = append(q.line, v)
	}
	q.next()
	return f.attempt, nil
}

// kick has the queue look whether it may go on.
func (q *queue) kick() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next()
}

// busy says whether anything is running or about to.
func (q *queue) busy() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.running > 0 || len(q.line) > 0
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
	if f := q.note(v); f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
}

// next starts what may run. The caller holds the lock.
func (q *queue) next() {
	for q.running < q.most && len(q.line) > 0 && !q.closed {
		v := q.line[0]
		f := q.note(v)
		if !f.hurry && q.hold() {
			return
		}
		q.line = q.line[1:]
		q.running++
		ctx, cancel := context.WithCancel(q.ctx)
		f.state, f.cancel = Running, cancel
		hurry := f.hurry
		q.tasks.Go(func() {
			defer cancel()
			q.finish(v, q.do(ctx, v, hurry))
		})
	}
}

// finish notes how an attempt ended, and plans the next one if it failed.
func (q *queue) finish(v *volume, err error) {
	q.settle(v, err)
	q.ended(v, err)
}

func (q *queue) settle(v *volume, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.running--
	f := q.note(v)
	a, hurry, paused, again := f.attempt, f.hurry, f.paused, f.again
	f.state, f.cancel, f.attempt, f.hurry, f.paused, f.again = Idle, nil, nil, false, false, false
	switch {
	case err == nil:
		f.failed, f.noSpace = 0, false
	case f.barred:
		err = errRemoved
	case q.closed:
		err = errClosed
	case paused:
		err = errPaused
		if again {
			f.state, f.hurry, f.attempt = Queued, hurry, &attempt{done: make(chan struct{})}
			q.line = append(q.line, v)
		}
	case q.final(err):
		f.failed = 0
	default:
		wait := min(firstRetry<<min(f.failed, 20), lastRetry)
		level := slog.LevelWarn
		if errors.Is(err, blockdev.ErrNoSpace) {
			wait = min(wait, noSpaceRetry)
			if f.noSpace {
				level = slog.LevelDebug // it was said before
			}
		}
		f.noSpace = errors.Is(err, blockdev.ErrNoSpace)
		f.failed++
		f.state = Waiting
		f.timer = time.AfterFunc(wait, func() { q.again(v) })
		q.log.Log(q.ctx, level, q.name+" failed", "diff", v.id, "error", err, "next", wait)
	}
	a.err = err
	close(a.done)
	q.next()
}

// again is what a timer does.
func (q *queue) again(v *volume) {
	q.mu.Lock()
	f := q.note(v)
	waits := f.state == Waiting && f.timer != nil
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
	f := q.note(v)
	f.barred = true
	q.stopTimer(v)
	a := f.attempt
	switch f.state {
	case Queued:
		q.unline(v)
		f.state, f.attempt, f.hurry = Idle, nil, false
		a.err = errRemoved
		close(a.done)
		a = nil
		q.next() // it may have held up the others
	case Running:
		f.cancel()
	default:
		f.state = Idle
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

// errPaused ends an attempt at a diff that nobody wants any more.
var errPaused = errors.New("the diff is not needed any more")

// pause takes a volume out until it is added again, and does not wait for the
// attempt under way to end. What somebody waits for goes on.
func (q *queue) pause(v *volume) {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.note(v)
	if f.hurry {
		return
	}
	q.stopTimer(v)
	switch f.state {
	case Queued:
		q.unline(v)
		f.state = Idle
		f.attempt.err = errPaused
		close(f.attempt.done)
		f.attempt = nil
		q.next() // it may have held up the others
	case Running:
		f.paused, f.again = true, false
		f.cancel()
	case Waiting:
		f.state = Idle
	case Idle:
	}
}

// allow undoes drop.
func (q *queue) allow(v *volume) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.note(v).barred = false
}

func (q *queue) state(v *volume) PrefetchState {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.note(v).state
}

// close ends everything and waits for it.
func (q *queue) close(all []*volume) {
	q.mu.Lock()
	q.closed = true
	for _, v := range all {
		q.stopTimer(v)
	}
	for _, v := range q.line {
		f := q.note(v)
		a := f.attempt
		f.state, f.attempt, f.hurry = Idle, nil, false
		a.err = errClosed
		close(a.done)
	}
	q.line = nil
	q.mu.Unlock()
	q.end()
	q.tasks.Wait()
}

// use returns how many volumes are worked on and wait.
func (q *queue) use() blockdev.Use {
	q.mu.Lock()
	defer q.mu.Unlock()
	return blockdev.Use{Used: int64(q.running), Waiting: int64(len(q.line)), Capacity: int64(q.most)}
}

// reportInterval is how often await calls report.
const reportInterval = 200 * time.Millisecond

// await waits for the next attempt at v, which goes before all others. Now and then it
// calls report.
func (q *queue) await(ctx context.Context, v *volume, report func()) error {
	for {
		// One that was paused just before ends without having done anything.
		if err := q.awaitOne(ctx, v, report); !errors.Is(err, errPaused) {
			return err
		}
	}
}

func (q *queue) awaitOne(ctx context.Context, v *volume, report func()) error {
	a, err := q.add(v, true)
	if err != nil {
		return err
	}
	tick := time.NewTicker(reportInterval)
	defer tick.Stop()
	for {
		select {
		case <-a.done:
			return a.err
		case <-tick.C:
			report()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
