package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/report"
)

// small is a swarm that is played in a moment.
func small() setup {
	return setup{seed: 1, nodes: 90, zones: 2, cell: 20, image: 8 * mega, link: giga, super: 10 * giga, supers: 1}
}

func mustPlay(t *testing.T, s setup) result {
	t.Helper()
	r, err := play(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSameSeedSameRun(t *testing.T) {
	s := withDeaths(small(), 5, 20*time.Millisecond, false)
	s.spread, s.hidden = 50*time.Millisecond, .1
	a, b := mustPlay(t, s), mustPlay(t, s)
	if !reflect.DeepEqual(a, b) {
		t.Errorf("two runs of one seed differ:\n%+v\n%+v", a, b)
	}
	s.seed = 2
	if c := mustPlay(t, s); reflect.DeepEqual(a.times, c.times) {
		t.Error("two seeds give the same times")
	}
	if a, b := playMesh(small()), playMesh(small()); !reflect.DeepEqual(a, b) {
		t.Error("two runs of the random graph differ")
	}
}

func TestEverybodyGetsEverythingAndTheSupernodeSendsItOnce(t *testing.T) {
	r := mustPlay(t, small())
	if len(r.times) != 90 || r.unfinished != 0 {
		t.Fatalf("%d of 90 nodes have everything, %d wait", len(r.times), r.unfinished)
	}
	if r.egress > 1.001 {
		t.Errorf("the supernode sent %.3f images", r.egress)
	}
	if r.cross > 1.1 {
		t.Errorf("a zone got %.3f images from others", r.cross)
	}
	if r.times[0] < .99 {
		t.Errorf("a node had everything after %.3f of the time that its link takes", r.times[0])
	}
	if p99 := quantile(r.times, .99); p99 > 2 {
		t.Errorf("p99 is %.2f", p99)
	}
	if r.duplicates > 0 {
		t.Errorf("%.4f of all chunks came twice", r.duplicates)
	}
}

func TestFewNodesAreNoSlowerThanDirect(t *testing.T) {
	for n := 1; n <= 3; n++ {
		s := small()
		s.nodes, s.zones, s.link, s.super, s.image = n, 1, 100*mega, giga, 50*mega
		swarm := mustPlay(t, s)
		s.parent, s.window = func(int) int { return -1 }, 64
		direct := mustPlay(t, s)
		if a, b := quantile(swarm.times, 1), quantile(direct.times, 1); a > 1.05*b {
			t.Errorf("%d nodes: %.3f, direct %.3f", n, a, b)
		}
	}
}

// Whatever dies, those who live get everything; and what a supernode takes with it
// is all that the registry has to give again.
func TestFaults(t *testing.T) {
	for name, change := range map[string]func(*setup){
		"half killed":          func(s *setup) { *s = withDeaths(*s, 1, 30*time.Millisecond, false) },
		"half vanish":          func(s *setup) { *s = withDeaths(*s, 1, 30*time.Millisecond, true) },
		"each knows half":      func(s *setup) { s.hidden = .5 },
		"they come later":      func(s *setup) { s.spread = time.Second },
		"later, half killed":   func(s *setup) { s.spread = time.Second; *s = withDeaths(*s, 1, time.Second/2, false) },
		"cold":                 func(s *setup) { s.registry, s.layers = giga, []float64{.6, .3, .1} },
		"a supernode dies":     func(s *setup) { lose(s, 0, 35*time.Millisecond) },
		"the other one dies":   func(s *setup) { lose(s, 1, 35*time.Millisecond) },
		"dies at the start":    func(s *setup) { lose(s, 0, time.Millisecond) },
		"dies when it is done": func(s *setup) { lose(s, 1, 80*time.Millisecond) },
	} {
		t.Run(name, func(t *testing.T) {
			s := small()
			change(&s)
			r := mustPlay(t, s)
			if r.unfinished > 0 || len(r.times) < 45 {
				t.Errorf("%d nodes have everything, %d wait for ever", len(r.times), r.unfinished)
			}
			if s.registry > 0 && r.registry-r.inFlight > 1.001 {
				t.Errorf("the registry gave %.3f images, of which %.3f were lost in flight", r.registry, r.inFlight)
			}
		})
	}
}

func lose(s *setup, supernode int, at time.Duration) {
	s.supers, s.registry, s.layers = 2, giga, []float64{.4, .3, .2, .1}
	s.kill = []death{{host: s.nodes + supernode, at: at}}
}

func TestQueueIsInOrder(t *testing.T) {
	var q queue
	r := rand.New(rand.NewPCG(1, 1))
	for i := range 2000 {
		q.push(event{at: int64(r.IntN(50)), a: int32(i)})
	}
	last := event{at: -1}
	for range 2000 {
		e := q.pop()
		if e.at < last.at || e.at == last.at && e.a < last.a {
			t.Fatalf("event %d of time %d comes after event %d of time %d", e.a, e.at, last.a, last.at)
		}
		last = e
	}
}

// A chunk takes its size over the slower link's rate, and a link one chunk at a time.
func TestNetworkTimes(t *testing.T) {
	n := newNetwork(1000, [2]time.Duration{time.Millisecond, 5 * time.Millisecond})
	// 1,000 bytes: 1 ms at 8 Mbit/s.
	a, b, c := n.addHost(0, 8e6, 8e6), n.addHost(0, 80e6, 4e6), n.addHost(1, 8e6, 8e6)
	n.send(int32(a), int32(b), 1, false)
	n.send(int32(a), int32(c), 2, false)
	n.send(int32(a), int32(c), 3, true)
	var got []event
	for e, ok := n.next(); ok; e, ok = n.next() {
		got = append(got, e)
	}
	ms := int64(time.Millisecond)
	want := []event{
		{at: 3 * ms, a: int32(b), b: 1},           // 1 ms of way, 2 ms of b's slow downlink
		{at: (1 + 5 + 1) * ms, a: int32(c), b: 3}, // sent after 1 ms, before 2, since somebody waits
		{at: (2 + 5 + 1) * ms, a: int32(c), b: 2},
	}
	if len(got) != len(want) {
		t.Fatalf("%d chunks came, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i].at != want[i].at || got[i].a != want[i].a || got[i].b != want[i].b {
			t.Errorf("arrival %d: chunk %d at %d after %v, want chunk %d at %d after %v", i,
				got[i].b, got[i].a, time.Duration(got[i].at), want[i].b, want[i].a, time.Duration(want[i].at))
		}
	}
	if n.hosts[c].crossed != 2 || n.hosts[b].crossed != 0 {
		t.Errorf("%d and %d chunks crossed zones, want 2 and 0", n.hosts[c].crossed, n.hosts[b].crossed)
	}
}

func TestBaselinesFinish(t *testing.T) {
	s := small()
	s.zones = 1
	mesh := playMesh(s)
	s.parent, s.window = func(i int) int { return (i+1)/2 - 1 }, 64
	tree := mustPlay(t, s)
	for name, r := range map[string]result{"random graph": mesh, "binary tree": tree} {
		if len(r.times) != s.nodes {
			t.Errorf("%s: %d of %d nodes have everything", name, len(r.times), s.nodes)
		}
	}
	if up := quantile(tree.upload, 1); up != 2 {
		t.Errorf("the busiest node of a binary tree uploads %.2f images, want 2", up)
	}
}

// The whole of the command, with everything a fiftieth of its size.
func TestCommandWritesReportAndPlots(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "out")
	c := command()
	c.SetOut(io.Discard)
	c.SetArgs([]string{"--out", dir, "--scale", "0.03", "--runs", "1"})
	if err := c.ExecuteContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "sim.json"))
	if err != nil {
		t.Fatal(err)
	}
	var rows []report.Row
	if err := json.Unmarshal(b, &rows); err != nil {
		t.Fatal(err)
	}
	if len(rows) < 25 {
		t.Errorf("%d rows", len(rows))
	}
	for _, r := range rows {
		if strings.Contains(r.Name, "in the end") && r.Value != 1 {
			t.Errorf("%s: %v", r.Name, r.Value)
		}
	}
	plots, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	if err != nil || len(plots) != 3 {
		t.Fatalf("plots %v, %v", plots, err)
	}
	for _, p := range plots {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d := xml.NewDecoder(f)
		for err == nil {
			_, err = d.Token()
		}
		if !errors.Is(err, io.EOF) {
			t.Errorf("%s is no XML: %v", p, err)
		}
	}
}

func TestQuantile(t *testing.T) {
	s := []float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
	if !slices.IsSorted(s) || quantile(s, .5) != 5 || quantile(s, .99) != 10 || quantile(s, 1) != 10 || quantile(s, 0) != 1 || quantile(nil, .5) != 0 {
		t.Errorf("quantiles of 1 to 10: %v %v %v %v", quantile(s, 0), quantile(s, .5), quantile(s, .99), quantile(s, 1))
	}
}
