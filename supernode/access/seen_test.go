package access

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
)

// TestTenThousandNodes: nodes with several private images each keep their access in an outage.
func TestTenThousandNodes(t *testing.T) {
	e := newEnv(t, onlyAlice)
	const nodes, repos = 10_000, 7
	for i := range repos {
		e.want(t, "up", "0", fmt.Sprintf("a%d:1", i), alice, Verdict{}, nil, 2)
	}
	now := e.clock()
	for i := repos; i < nodes*repos; i++ { // as Allow does it
		e.note(e.key(fmt.Sprint(i/repos), registry.Reference{Host: "registry.example", Repository: fmt.Sprintf("a%d", i%repos)}, "credential"), now)
	}
	down := func(when string) {
		t.Helper()
		e.pass(10 * time.Minute)
		e.reg.set(says(errDown))
		for i := range repos {
			if v, err := e.may(t, "0", fmt.Sprintf("a%d:1", i), alice); err != nil || !v.Stale {
				t.Errorf("%s: the first node, repository %d: %+v, %v", when, i, v, err)
			}
		}
		e.want(t, when+", another node", "other", "a0:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)
	}
	down("down")
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	e.open(t)
	down("after a restart")
}

// TestRegistryThatSaysYes: one that lets a peer read any number of repositories, with a
// credential or without one, takes no access from others, nor from other registries of that
// peer.
func TestRegistryThatSaysYes(t *testing.T) {
	e := newEnv(t, onlyAlice)
	e.want(t, "private", "p", "a:1", alice, Verdict{}, nil, 2)
	e.want(t, "private, same peer", "attacker", "a:1", alice, Verdict{}, nil, 0)
	e.reg.set(says(nil))
	e.want(t, "public", "p", "public:1", image.Credential{}, Verdict{Public: true}, nil, 1)
	now := e.clock()
	for i := range maxGroup + 1000 { // as Allow does it
		ref := registry.Reference{Host: "attacker.example", Repository: fmt.Sprint(i)}
		e.note(e.key("attacker", ref, "credential"), now)
		e.Access.mu.Lock()
		e.public.note(publicKey(ref), now)
		e.Access.mu.Unlock()
	}
	e.pass(10 * time.Minute)
	e.reg.set(says(errDown))
	e.want(t, "down, private", "p", "a:1", alice, Verdict{Stale: true}, nil, 1)
	e.want(t, "down, private, same peer", "attacker", "a:1", alice, Verdict{Stale: true}, nil, 0)
	e.want(t, "down, public", "p", "public:1", image.Credential{}, Verdict{Public: true, Stale: true}, nil, 1)
	for what, s := range map[string]*seen{"peer": e.peers, "registry host": e.public} {
		if n := s.n - 2; n > maxGroup || n < maxGroup/2 {
			t.Errorf("the %s has %d accesses, and may have %d", what, n, maxGroup)
		}
	}
}

// number is an access of a peer to a repository of a registry host.
func number(peer, host, repo int) (k accessKey) {
	k.group[0], k.group[1] = byte(peer), byte(peer>>8)
	k.id[0] = byte(host)
	k.id[4], k.id[5], k.id[6] = byte(repo), byte(repo>>8), byte(repo>>16)
	return k
}

// TestRoom: what makes room in all is of a peer that has much, and its oldest.
func TestRoom(t *testing.T) {
	const limit = 1000
	s := newSeen(limit, Config{TTL: time.Minute, Grace: time.Hour})
	now := time.Unix(1e9, 0)
	for i := range 10 {
		s.note(number(1, 0, i), now)
		s.note(number(2, 0, i), now)
	}
	for i := range 2 * limit {
		now = now.Add(time.Second)
		s.note(number(3, 0, i), now)
		if size := s.n + groupCost*len(s.groups); size > limit {
			t.Fatalf("%d accesses of %d groups, limit %d", s.n, len(s.groups), limit)
		}
	}
	for i := range 10 {
		for peer := 1; peer <= 2; peer++ {
			if find(s.groups[number(peer, 0, 0).group], number(peer, 0, i).id) < 0 {
				t.Errorf("peer %d has lost access %d", peer, i)
			}
		}
	}
	if g := s.groups[number(3, 0, 0).group]; find(g, number(3, 0, 2*limit-1).id) < 0 || find(g, number(3, 0, 0).id) >= 0 {
		t.Error("the newest access of the peer is lost, or its oldest is there")
	}
	if s.sweep(now.Add(2 * time.Hour)); s.n != 0 || len(s.groups) != 0 {
		t.Errorf("%d accesses in %d groups after the grace", s.n, len(s.groups))
	}
}

// TestLoadsNoRubbish: a record that is none is dropped.
func TestLoadsNoRubbish(t *testing.T) {
	s := newSeen(1000, Config{})
	id := make([]byte, len(groupID{}))
	for _, r := range []struct{ id, b []byte }{{id, nil}, {id, make([]byte, recordSize+1)}, {id[1:], make([]byte, recordSize)}, {id, make([]byte, (maxGroup+1)*recordSize)}} {
		if s.load(r.id, r.b) {
			t.Errorf("took a name of %d and a record of %d bytes", len(r.id), len(r.b))
		}
	}
	if !s.load(id, make([]byte, maxGroup*recordSize)) || s.n != maxGroup {
		t.Error("a full group is refused")
	}
}

// BenchmarkFull measures what the accesses of 10,000 nodes to 100 private repositories each
// take: memory, file, the start with that file, and the longest that all others wait (sweep).
func BenchmarkFull(b *testing.B) {
	const nodes, repos, minutes = 10_000, 100, 30
	start := time.Now()
	clock := func() time.Time { return start }
	cfg := Config{Dir: b.TempDir(), TTL: 5 * time.Minute, Grace: 24 * time.Hour, Log: slog.New(slog.DiscardHandler), Now: clock}
	open := func() *Access {
		a, err := Open(cfg)
		if err != nil {
			b.Fatal(err)
		}
		return a
	}
	heap := func() float64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	for b.Loop() {
		_ = os.Remove(filepath.Join(cfg.Dir, File))
		before := heap()
		a := open()
		all := rand.Perm(nodes * repos)
		var longest time.Duration
		for i, j := range all {
			a.note(a.key(fmt.Sprint(j%nodes), registry.Reference{Host: "registry.example", Repository: fmt.Sprint(j / nodes)}, "alice"), start)
			if i%(len(all)/minutes) == 0 {
				at := time.Now()
				if err := a.write(); err != nil {
					b.Fatal(err)
				}
				longest = max(longest, time.Since(at))
			}
		}
		b.ReportMetric(heap()-before, "B-built")
		b.ReportMetric(longest.Seconds()*1e3, "ms-write")
		if a.peers.n != nodes*repos {
			b.Fatalf("%d accesses", a.peers.n)
		}
		if err := a.Close(); err != nil {
			b.Fatal(err)
		}
		st, err := os.Stat(filepath.Join(cfg.Dir, File))
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(st.Size()), "B-file")
		a = nil
		before = heap()
		at := time.Now()
		a = open()
		b.ReportMetric(time.Since(at).Seconds()*1e3, "ms-start")
		b.ReportMetric(heap()-before, "B-loaded")
		at = time.Now()
		a.sweep(start)
		b.ReportMetric(time.Since(at).Seconds()*1e3, "ms-sweep")
		if err := a.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
