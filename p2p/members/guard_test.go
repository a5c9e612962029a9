package members

import (
	"context"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

// openConn is a connection as far as a session looks at it.
type openConn struct{ network.Conn }

func (openConn) IsClosed() bool { return false }

// asker is a node whose supernodes answer when the test says so.
type asker struct {
	*Node
	homes []*session
}

func newAsker(t *testing.T, supernodes int, groups ...blockdev.Digest) *asker {
	t.Helper()
	c := Config{Token: func() (string, error) { return "", net.ErrClosed }}
	for i := range supernodes {
		c.Supernodes = append(c.Supernodes, peer.AddrInfo{ID: host.FromKey([32]byte{200, byte(i)})})
	}
	n, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.cancel)
	a := &asker{Node: n}
	for _, info := range c.Supernodes {
		s := n.super[info.ID]
		s.joined = openConn{}
		a.homes = append(a.homes, s)
	}
	for i, g := range groups {
		n.groups[g] = &group{id: g, home: a.homes[i%supernodes]}
	}
	return a
}

// What groups have a diff is known without going through all of them, and follows
// joins, changes and leaves.
func TestGroupsOfDiff(t *testing.T) {
	a := newAsker(t, 1)
	d := func(i byte) blockdev.Digest { return blockdev.Digest{1, i} }
	m := func(i byte) blockdev.Digest { return blockdev.Digest{2, i} }
	want := func(diff blockdev.Digest, groups ...blockdev.Digest) {
		t.Helper()
		if got := a.Groups(diff); !slices.Equal(got, groups) {
			t.Errorf("groups of diff %d: %v, want %v", diff[1], got, groups)
		}
	}
	a.Join(m(1), []blockdev.Digest{d(1), d(2), d(1)}, nil)
	a.Join(m(2), []blockdev.Digest{d(1)}, nil)
	want(d(1), m(1), m(2))
	want(d(2), m(1))
	want(d(3))
	a.groups[m(2)].members = map[peer.ID]*entry{"x": {}} // most members first
	want(d(1), m(2), m(1))
	a.Join(m(1), []blockdev.Digest{d(3)}, nil)
	want(d(1), m(2))
	want(d(2))
	want(d(3), m(1))
	a.Leave(m(1))
	a.Leave(m(2))
	if len(a.byDiff) != 0 {
		t.Errorf("%d diffs are kept that no group has", len(a.byDiff))
	}
}

// BenchmarkGroups is what each request for chunks does first.
func BenchmarkGroups(b *testing.B) {
	n := &Node{byDiff: map[blockdev.Digest][]*group{}, groups: map[blockdev.Digest]*group{}}
	for i := range 200 {
		g := &group{id: blockdev.Digest{2, byte(i)}}
		n.groups[g.id] = g
		var diffs []blockdev.Digest
		for j := range 20 {
			diffs = append(diffs, blockdev.Digest{1, byte(i), byte(j)})
		}
		n.setDiffsLocked(g, diffs)
	}
	for b.Loop() {
		n.Groups(blockdev.Digest{1, 77, 7})
	}
}

// questions takes what is to be asked of a supernode.
func (a *asker) questions(i int) []wire.Key {
	s := a.homes[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	who := s.who
	s.who = nil
	return who
}

func (a *asker) says(i int, key wire.Key, groups ...blockdev.Digest) {
	var joined []byte
	for _, g := range groups {
		joined = append(joined, g[:]...)
	}
	a.answer(a.homes[i], &wire.Answer{Key: key[:], Groups: joined})
}

// allowed runs Allowed beside the test.
func (a *asker) allowed(ctx context.Context, g blockdev.Digest, id peer.ID) <-chan error {
	done := make(chan error, 1)
	go func() { done <- a.Allowed(ctx, g, id) }()
	synctest.Wait()
	return done
}

var (
	g1, g2 = blockdev.Digest{1}, blockdev.Digest{2}
	pKey   = wire.Key{9}
	p      = host.FromKey(pKey)
)

// A yes counts for the groups that it names; about others supernodes are asked
// again, though not more often than every 100 ms.
func TestYesCountsForItsGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsker(t, 1, g1, g2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		first := a.allowed(ctx, g1, p)
		if len(a.questions(0)) != 1 {
			t.Fatal("the supernode is not asked once")
		}
		a.says(0, pKey, g1)
		if err := <-first; err != nil {
			t.Fatal(err)
		}
		// It joins g2 now, and asks at once.
		time.Sleep(time.Millisecond)
		began := time.Now()
		second := a.allowed(ctx, g2, p)
		if len(a.questions(0)) != 0 {
			t.Error("asked again at once")
		}
		time.Sleep(againTime)
		synctest.Wait()
		if len(a.questions(0)) != 1 {
			t.Fatal("not asked again about the second group")
		}
		if err := a.Allowed(ctx, g1, p); err != nil {
			t.Errorf("while the supernode is asked about the second group, the first: %v", err)
		}
		a.says(0, pKey, g1, g2)
		if err := <-second; err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("that took %v", took)
		}
		// A no is one, after one question.
		time.Sleep(time.Millisecond)
		third := a.allowed(ctx, blockdev.Digest{3}, p)
		time.Sleep(againTime)
		synctest.Wait()
		asked := len(a.questions(0))
		a.says(0, pKey, g1, g2)
		if err := <-third; err == nil || asked != 1 {
			t.Errorf("a group that the peer is not in: %v, asked %d times", err, asked)
		}
		// And the yes ends.
		time.Sleep(yesTime)
		fourth := a.allowed(ctx, g1, p)
		if len(a.questions(0)) != 1 {
			t.Error("an old yes counts for ever")
		}
		a.says(0, pKey)
		if err := <-fourth; err == nil {
			t.Error("a peer that has left is let in")
		}
		// Somebody that supernodes do not know costs a question a second.
		for range 10 {
			if err := a.Allowed(ctx, g1, p); err == nil {
				t.Error("a peer that has left is let in")
			}
		}
		if n := len(a.questions(0)); n != 0 {
			t.Errorf("asked %d times within a second of a no", n)
		}
	})
}

// Enter adds to a question that is being asked: those that wait for its answer get
// it, and what the supernode names counts at once.
func TestEnterWhileAsking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsker(t, 2, g1, g2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began := time.Now()
		first := a.allowed(ctx, g1, p)
		a.says(1, pKey) // the other one is still being asked
		leave := a.Enter(&image.Image{Manifest: g2}, []peer.AddrInfo{{ID: p}})
		defer leave()
		if err := a.Allowed(ctx, g2, p); err != nil {
			t.Errorf("a peer that a supernode has named: %v", err)
		}
		a.says(0, pKey, g1)
		if err := <-first; err != nil || time.Since(began) > time.Second {
			t.Errorf("the question was forgotten: %v after %v", err, time.Since(began))
		}
	})
}

// A supernode that never answers does not keep the others' word from being asked for.
func TestSilentSupernode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsker(t, 2, g1, g2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		first := a.allowed(ctx, g1, p)
		a.says(0, pKey, g1)
		if err := <-first; err != nil {
			t.Fatal(err)
		}
		a.questions(0)
		a.groups[g2].home = a.homes[0]
		second := a.allowed(ctx, g2, p)
		time.Sleep(askTime)
		synctest.Wait()
		if len(a.questions(0)) != 1 {
			t.Fatal("not asked again")
		}
		a.says(0, pKey, g2)
		if err := <-second; err != nil {
			t.Error(err)
		}
	})
}
