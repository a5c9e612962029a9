package volume

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
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

// newPrefetchQueue makes the queue that fetches diffs.
func (m *Manager) newPrefetchQueue() *queue {
	return newQueue(m.cfg.Log, m.cfg.PrefetchDiffs, task{
		name:  "prefetch",
		note:  func(v *volume) *fetchState { return &v.fetch },
		do:    func(ctx context.Context, v *volume, _ bool) error { return v.diff.Prefetch(ctx) },
		hold:  func() bool { return false },
		final: func(error) bool { return false },
		ended: func(v *volume, err error) {
			if err == nil {
				m.refresh(v)
				m.match(m.queue.ctx, v)
				m.prove(v)
				if v.diff.Completed() && !v.diff.Complete() {
					m.refetch(v) // damage was found just before the attempt ended
				}
			}
			m.proofs.kick() // they wait until nothing is being fetched
			m.scrubs.kick()
		},
	})
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

// ContainerStarts says that a container on these diffs is about to start: prefetch
// waits for it, and its first reads are recorded (Config.Profiles).
func (m *Manager) ContainerStarts(ids ...blockdev.Digest) {
	m.cache.ExpectDemand()
	m.record(m.known(ids))
}

// known returns the volumes of those diffs that are there.
func (m *Manager) known(ids []blockdev.Digest) (vols []*volume) {
	for _, id := range ids {
		if v, err := m.volume(id); err == nil {
			vols = append(vols, v)
		}
	}
	return vols
}

// Prefetch fetches everything of these diffs in the background, in this order and
// behind what is queued already. Attempts that fail are repeated until they
// succeed, StopPrefetch ends them or the diff is removed. Unknown and complete
// diffs are passed over.
func (m *Manager) Prefetch(ids ...blockdev.Digest) {
	for _, v := range m.known(ids) {
		if !v.diff.Complete() {
			_, _ = m.queue.add(v, false) // refused: it is being removed, or closed
		}
	}
}

// StopPrefetch ends what Prefetch has begun for these diffs. What has come stays.
// A diff that PrefetchWait waits for goes on, and so does one whose damage is being
// put right.
func (m *Manager) StopPrefetch(ids ...blockdev.Digest) {
	for _, v := range m.known(ids) {
		v.mu.Lock()
		stale := v.stale
		v.mu.Unlock()
		if !stale {
			m.queue.pause(v)
		}
	}
}

// Incomplete reports whether a diff that is there has bytes that are not.
func (m *Manager) Incomplete(id blockdev.Digest) bool {
	v, err := m.volume(id)
	return err == nil && !v.diff.Complete()
}

// progressInterval is how often PrefetchWait reports.
const progressInterval = 200 * time.Millisecond

// PrefetchWait prefetches one diff before all that are queued, and returns when
// every byte of it is on this node, verified and synced, and its index is proven.
// While it waits it calls progress (which may be nil) a few times a second, and
// once before the proof, with the bytes that are here and all there are. If an
// attempt fails it returns the cause at once, and the queue goes on trying, but
// for one that wraps blockdev.ErrQuarantined. If ctx ends, the prefetch goes on.
func (m *Manager) PrefetchWait(ctx context.Context, id blockdev.Digest, progress func(local, total int64)) error {
	v, err := m.volume(id)
	if err != nil {
		return err
	}
	defer v.diff.Hurry()()
	report := func() {
		if progress != nil {
			s := v.diff.Stat()
			progress(s.BytesPresent, s.Bytes)
		}
	}
	for {
		if !v.diff.Complete() {
			if err := m.await(ctx, m.queue, v, report); err != nil {
				return err
			}
		}
		report()
		if v.diff.Proof() == cache.Proven {
			return nil
		}
		// Damage that the proof finds is fetched again.
		err := m.await(ctx, m.proofs, v, report)
		if err != nil && !errors.Is(err, cache.ErrIncomplete) && !errors.Is(err, cache.ErrDamaged) {
			return err
		}
	}
}

// await waits for a queue's next attempt at v, which goes before all others.
func (m *Manager) await(ctx context.Context, q *queue, v *volume, report func()) error {
	for {
		// One that was paused just before ends without having done anything.
		if err := m.awaitOne(ctx, q, v, report); !errors.Is(err, errPaused) {
			return err
		}
	}
}

func (m *Manager) awaitOne(ctx context.Context, q *queue, v *volume, report func()) error {
	a, err := q.add(v, true)
	if err != nil {
		return err
	}
	tick := time.NewTicker(progressInterval)
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

// use returns how many volumes are worked on and wait.
func (q *queue) use() blockdev.Use {
	q.mu.Lock()
	defer q.mu.Unlock()
	return blockdev.Use{Used: int64(q.running), Waiting: int64(len(q.line)), Capacity: int64(q.most)}
}
