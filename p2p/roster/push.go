package roster

import (
	"time"
)

const (
	// pushEvery is the least time between two updates of a group to its members,
	// maxPushEvery that of the largest groups. The first update after a silence
	// goes out at once.
	pushEvery    = 100 * time.Millisecond
	maxPushEvery = 500 * time.Millisecond
)

// interval is the least time between two flushes of the group: a message for each
// member and flush, so larger groups have fewer of them.
func (g *group) interval() time.Duration {
	return min(pushEvery+time.Duration(g.Size()/20)*time.Millisecond, maxPushEvery)
}

// restored is when members that have come back to a new group learn its members.
func (g *group) restored(lease time.Duration) time.Time {
	quiet := g.began
	if g.back.After(quiet) {
		quiet = g.back
	}
	quiet = quiet.Add(restoreQuiet)
	if end := g.began.Add(lease); end.Before(quiet) {
		return end
	}
	return quiet
}

// due is when the group is to be flushed.
func (g *group) due(lease time.Duration) time.Time {
	next := g.last.Add(g.interval())
	if g.changed {
		return next
	}
	if end := g.restored(lease); end.After(next) {
		return end
	}
	return next
}

// dirtyLocked has a group flushed, soon.
func (l *List) dirtyLocked(g *group) {
	l.dirty[g] = struct{}{}
	if !g.changed {
		g.changed = true
		signal(l.work)
	}
}

// push flushes dirty groups.
func (l *List) push() {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-l.work:
		case <-t.C:
		case <-l.ctx.Done():
			return
		}
		if wait, more := l.flush(time.Now()); more {
			t.Reset(wait)
		}
	}
}

// flush flushes the groups whose time has come, and says when the next one's does.
func (l *List) flush(now time.Time) (wait time.Duration, more bool) {
	l.mu.Lock()
	var ready []*group
	for g := range l.dirty {
		if !g.due(l.cfg.Lease).After(now) {
			ready = append(ready, g)
		}
	}
	l.mu.Unlock()
	for _, g := range ready {
		l.flushGroup(g, now)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for g := range l.dirty {
		if due := g.due(l.cfg.Lease).Sub(now); !more || due < wait {
			wait, more = due, true
		}
	}
	return wait, more
}

// flushGroup tells the members of a group what is new. It is for push alone: what is
// collected is sent before more is. Messages are made and queued without the lock,
// which every stream of every peer needs.
func (l *List) flushGroup(g *group, now time.Time) {
	l.mu.Lock()
	if l.groups[g.id] != g { // all have left
		l.mu.Unlock()
		return
	}
	if g.restoring && !g.restored(l.cfg.Lease).After(now) {
		g.restoring = false
		g.Restored()
	}
	u := g.Collect(receiver)
	g.last, g.changed = now, false
	l.mu.Unlock()

	failed, err := u.Send()
	if err != nil {
		l.log.Error("cannot send the members of an image's group to nodes", "manifest", g.id, "error", err)
	}
	l.metrics.pushes.Add(float64(u.Messages))
	l.metrics.pushBytes.Add(float64(u.Bytes))

	l.mu.Lock()
	defer l.mu.Unlock()
	g.Failed(failed)
	g.changed = g.changed || len(failed) > 0
	if !g.changed && !g.restoring {
		delete(l.dirty, g)
	}
}
