package volume

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/shoalfs/shoal/blockdev"
)

// Upstream is where a Manager gets what it does not have. Source is required; the zero
// value of the rest means its default.
type Upstream struct {
	// Source is where missing chunks come from.
	Source blockdev.Source
	// Profiles takes what containers have read at their start; nil: it is not
	// recorded.
	Profiles blockdev.ProfileSink
	// Inflight is cache.Config.Inflight.
	Inflight func() int64
	// MakeRoom is cache.Config.MakeRoom.
	MakeRoom func(ctx context.Context) (freed bool)
	// Describe returns what an operator calls a diff, as attributes of log lines;
	// nil: there is no other name.
	Describe func(blockdev.Digest) []any
}

// Attach gives the Manager its Upstream, once: reads that wait for missing bytes go on.
func (m *Manager) Attach(u Upstream) error {
	if u.Source == nil {
		return errors.New("volume: Upstream.Source must be set")
	}
	if !m.late.up.CompareAndSwap(nil, &u) {
		return errors.New("volume: there is an Upstream already")
	}
	close(m.late.attached)
	return nil
}

// Detach is to be called before what Attach was given is closed. Startup fetches and
// recordings end for good, and what was recorded is reported. From then on a request that
// fails is not answered: its reader gets from the next process what that has, or
// the error of its own deadline.
func (m *Manager) Detach() {
	m.startups.tasks.Close()
	m.late.once.Do(func() { close(m.late.detached) })
}

// late is a blockdev.Source that is there before what it asks.
type late struct {
	up       atomic.Pointer[Upstream] // nil until attached is closed
	attached chan struct{}
	detached chan struct{}
	once     sync.Once // of Detach
}

func newLate() *late {
	return &late{attached: make(chan struct{}), detached: make(chan struct{})}
}

// now returns the Upstream; if there is none yet, one that has nothing.
func (l *late) now() *Upstream {
	if u := l.up.Load(); u != nil {
		return u
	}
	return &Upstream{}
}

// wait returns the Upstream as soon as there is one, or ctx's error.
func (l *late) wait(ctx context.Context) (*Upstream, error) {
	select {
	case <-l.attached:
		return l.up.Load(), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Fetch implements blockdev.Source.
func (l *late) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	up, err := l.wait(ctx)
	if err != nil {
		return err
	}
	if err = up.Source.Fetch(ctx, req, deliver); err == nil {
		return nil
	}
	select {
	case <-l.detached:
		<-ctx.Done()
		return context.Cause(ctx)
	default:
		return err
	}
}

// defaultInflight is how many bytes of prefetch are under way where the Upstream does not
// say.
const defaultInflight = 4 << 20

// inflight is cache.Config.Inflight.
func (l *late) inflight() int64 {
	if f := l.now().Inflight; f != nil {
		return f()
	}
	return defaultInflight
}

// makeRoom is cache.Config.MakeRoom.
func (l *late) makeRoom(ctx context.Context) bool {
	f := l.now().MakeRoom
	return f != nil && f(ctx)
}

// describe is fusefs.Options.Describe.
func (l *late) describe(diff blockdev.Digest) []any {
	if f := l.now().Describe; f != nil {
		return f(diff)
	}
	return nil
}

// report hands over what was recorded.
func (l *late) report(ctx context.Context, profiles []blockdev.DiffProfile) error {
	up, err := l.wait(ctx)
	if err != nil || up.Profiles == nil {
		return err
	}
	return up.Profiles.ReportProfiles(ctx, profiles)
}
