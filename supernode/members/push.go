package members

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
func (g *groupState) interval() time.Duration {
	return min(pushEvery+time.Duration(g.size/20)*time.Millisecond, maxPushEvery)
}

// dirtyLocked has a group flushed, soon.
func (l *List) dirtyLocked(g *groupState) {
	if !g.dirty {
		g.dirty = true
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
	defer l.mu.Unlock()
	for id, g := range l.groups {
		if !g.dirty {
			continue
		}
		due := g.interval() - now.Sub(g.last)
		if due <= 0 {
			again, err := g.flush(l.sendLocked)
			if err != nil {
				l.log.Error("cannot tell nodes about an image's group", "manifest", id, "err", err)
			}
			g.last, g.dirty = now, again
			due = g.interval()
		}
		if g.dirty && (!more || due < wait) {
			wait, more = due, true
		}
	}
	return wait, more
}

func (l *List) sendLocked(m *member, msg []byte) bool {
	if m.session == nil {
		return true // it gets everything when it is back
	}
	ok := m.session.send(msg)
	if ok {
		l.metrics.pushes.Inc()
		l.metrics.pushBytes.Add(float64(len(msg)))
	}
	return ok
}
