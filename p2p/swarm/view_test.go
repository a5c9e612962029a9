package swarm

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/lru"
	"github.com/shoalfs/shoal/p2p/route"
)

// lateView is Groups of one group, the view of which comes later.
type lateView struct {
	mu      sync.Mutex
	view    *route.View
	changed chan struct{}
}

func (l *lateView) Groups(diff blockdev.Digest) []blockdev.Digest {
	if diff != theDiff {
		return nil
	}
	return []blockdev.Digest{theGroup}
}

func (l *lateView) View(blockdev.Digest) *route.View {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.view
}

func (l *lateView) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

func (l *lateView) Addrs(peer.ID) (peer.AddrInfo, bool)                     { return peer.AddrInfo{}, false }
func (l *lateView) Allowed(context.Context, blockdev.Digest, peer.ID) error { return nil }

// set is called when the supernode has told something.
func (l *lateView) set(v *route.View) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.view = v
	close(l.changed)
	l.changed = make(chan struct{})
}

var theDiff = blockdev.Sum([]byte("diff"))

// Prefetch waits for the first view of a group for a moment, once.
// A prefetch waits longer for who sends other chunks, but not for ever.
func TestWaitUntil(t *testing.T) {
	last := time.Now()
	for _, c := range []struct{ heard, giveUp, want time.Duration }{
		{heard: -time.Second, giveUp: 2 * time.Second, want: 2 * time.Second},
		{heard: 5 * time.Second, giveUp: 2 * time.Second, want: 7 * time.Second},
		{heard: time.Hour, giveUp: 2 * time.Second, want: keptBack},
		{heard: time.Hour, giveUp: time.Minute, want: time.Minute},
	} {
		if got := waitUntil(last, last.Add(c.heard), c.giveUp).Sub(last); got != c.want {
			t.Errorf("heard after %v, given up after %v: waits %v, not %v", c.heard, c.giveUp, got, c.want)
		}
	}
}

// More is under way where trees have more levels.
func TestInflight(t *testing.T) {
	w := newWorld(t, 1<<20)
	n := w.node(options{})
	want := func(levels int64) {
		t.Helper()
		if n.swarm.group(w.ix.DiffID) == nil {
			t.Fatal("no group")
		}
		if got := n.swarm.Inflight(); got != levels*2<<20 {
			t.Errorf("%d members: %d bytes, not 2 MiB for each of %d levels", len(w.view.Members), got, levels)
		}
	}
	want(2)                       // the least
	for len(w.view.Members) < 4 { // a root and its children
		w.join(newHost(t), "")
	}
	want(2)
	w.join(newHost(t), "")
	want(3)
}

func TestFirstView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		groups := &lateView{changed: make(chan struct{})}
		s := &Swarm{
			cfg: Config{Groups: groups}, book: route.NewBook(route.BookOptions{}),
			groups: lru.New[blockdev.Digest, *group](maxGroups), begun: lru.New[blockdev.Digest, time.Time](maxGroups),
		}
		waited := func(diff blockdev.Digest, ctx context.Context) (*group, time.Duration) {
			began := time.Now()
			g := s.awaitGroup(ctx, diff)
			return g, time.Since(began)
		}
		if g, d := waited(blockdev.Sum([]byte("nobody's")), t.Context()); g != nil || d != 0 {
			t.Errorf("group %v of a diff that is in none, after %v", g, d)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if g, d := waited(theDiff, ended); g != nil || d != 0 {
			t.Errorf("group %v after the end, after %v", g, d)
		}
		time.Sleep(firstView / 4)
		time.AfterFunc(firstView/4, func() { groups.set(nil) }) // another group's
		time.AfterFunc(firstView/2, func() { groups.set(&route.View{Group: theGroup, Version: 1}) })
		if g, d := waited(theDiff, t.Context()); g == nil || d != firstView/2 {
			t.Errorf("group %v after %v", g, d)
		}
		groups.set(nil) // the supernode is gone, what it said is forgotten
		if g, d := waited(theDiff, t.Context()); g != nil || d != firstView/4 {
			t.Errorf("group %v after %v", g, d)
		}
		if g, d := waited(theDiff, t.Context()); g != nil || d != 0 {
			t.Errorf("group %v, and a second wait of %v", g, d)
		}
	})
}
