package integration

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// Drills break one thing at a time, again and again, while programs read. In
// make test each is short, and what goes wrong fails the test; make drill sets
// SHOAL_ROUNDS and SHOAL_DRILL_OUT, and what goes wrong is a row of the report: it
// fails only where nothing could be measured.

// drills collects the rows of all drills of this run.
var drills struct {
	sync.Mutex
	report.Report
}

// isDrill says whether this is make drill.
func isDrill() bool { return os.Getenv("SHOAL_DRILL_OUT") != "" }

// rounds is how often something is broken: SHOAL_ROUNDS, or the short number.
func rounds(t *testing.T, short int) int {
	t.Helper()
	s := os.Getenv("SHOAL_ROUNDS")
	if s == "" {
		return short
	}
	return must(strconv.Atoi(s))(t)
}

// count adds a row for things of which there must be none.
func count(t *testing.T, name string, n int) {
	t.Helper()
	figure(t, name, "", report.AtMost, 0, float64(n))
	if n > 0 && !isDrill() {
		t.Errorf("%s: %d", name, n)
	}
}

// figure adds a row with a bar that no test should depend on, such as a time; with
// no cmp it has no bar, and explains others.
func figure(t *testing.T, name, unit string, cmp report.Cmp, bar float64, samples ...float64) {
	t.Helper()
	if len(samples) == 0 {
		t.Fatalf("%s: nothing was measured", name)
	}
	drills.Lock()
	defer drills.Unlock()
	drills.Add(name, unit, cmp, bar, samples...)
	if isDrill() { // at once, so that they are there also if a later drill never ends
		noError(t, drills.Save(os.Getenv("SHOAL_DRILL_OUT"), "drill"))
	}
}

func TestMain(m *testing.M) {
	code := m.Run()
	if isDrill() || code != 0 { // what was counted says best what went wrong
		if err := drills.Print(os.Stdout); err != nil {
			println(err.Error())
			code = 1
		}
	}
	os.Exit(code)
}

// tally is what one drill counts.
type tally struct {
	drill  string
	rounds int
	// The longest read around each time that something was broken, and, to
	// compare, before it; where that is looked at.
	pauses, calm pauses

	mu            sync.Mutex
	reads         int64
	failed, wrong []error
}

// add counts reads, and what went wrong with some of them; nil is nothing.
func (d *tally) add(reads int64, errs ...error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reads += reads
	for _, err := range errs {
		switch {
		case errors.Is(err, lab.ErrWrong):
			d.wrong = append(d.wrong, err)
		case err != nil:
			d.failed = append(d.failed, err)
		}
	}
}

// file reads a file and compares.
func (d *tally) file(path, want string) {
	got, err := os.ReadFile(path)
	if err == nil && string(got) != want {
		err = fmt.Errorf("%s: %w", path, lab.ErrWrong)
	}
	d.add(1, err)
}

// end stops readers and counts what they have seen.
func (d *tally) end(readers ...*lab.Readers) {
	for _, r := range readers {
		errs := r.Stop()
		d.add(r.Reads(), errs...)
	}
}

// mounted counts what is mounted in the lab, and a layer once: the node keeps a mount that
// it has replaced for minutes.
func (s *site) mounted(t *testing.T) int {
	t.Helper()
	infos := must(mountinfo.GetMounts(mountinfo.PrefixFilter(s.Dir)))(t)
	different := make(map[string]struct{})
	for _, i := range infos {
		what := i.Mountpoint
		if filepath.Dir(what) == filepath.Join(s.node.Root, "m") {
			what = i.Source
		}
		different[what] = struct{}{}
	}
	return len(different)
}

// rows adds the drill's rows to the report.
func (d *tally) rows(t *testing.T) {
	t.Helper()
	for _, err := range append(d.failed, d.wrong...)[:min(20, len(d.failed)+len(d.wrong))] {
		t.Log(err)
	}
	if d.reads == 0 {
		t.Fatalf("%s: nothing was read", d.drill)
	}
	figure(t, d.drill+": rounds", "", "", 0, float64(d.rounds))
	figure(t, d.drill+": reads", "", "", 0, float64(d.reads))
	count(t, d.drill+": failed reads", len(d.failed))
	count(t, d.drill+": wrong bytes", len(d.wrong))
	if len(d.pauses) > 0 {
		figure(t, d.drill+": longest pause", "s", "", 0, d.pauses.at(1).Seconds())
	}
	if len(d.calm) > 0 {
		figure(t, d.drill+": longest read between two, p99", "s", "", 0, d.calm.at(0.99).Seconds())
	}
	t.Logf("%d rounds, %d reads, %d failed, %d wrong; %v; in between %v", d.rounds, d.reads, len(d.failed), len(d.wrong), d.pauses, d.calm)
}

// pauses are the longest reads of each round.
type pauses []time.Duration

// at is the pause that a part q of all does not exceed; there must be one.
func (p pauses) at(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(p))
	return sorted[max(0, int(math.Ceil(q*float64(len(p))))-1)]
}

func (p pauses) String() string {
	if len(p) == 0 {
		return "no pauses"
	}
	at := func(q float64) time.Duration { return p.at(q).Round(time.Millisecond) }
	return fmt.Sprintf("%d pauses: p50 %v, p99 %v, max %v", len(p), at(0.5), at(0.99), at(1))
}

// wait is the moment at which something is broken.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// goOn waits until n reads have ended that began before it was called or after.
func goOn(ctx context.Context, r *lab.Readers, n int64) error {
	before := r.Reads()
	return lab.WaitFor(ctx, "reads that go on", 30*time.Second, func() error {
		if got := r.Reads() - before; got < n {
			return fmt.Errorf("%d reads", got)
		}
		return nil
	})
}

// TestDrillKill kills the node at random moments, while four containers work and
// programs outside read, some of them what is still being fetched.
func TestDrillKill(t *testing.T) {
	s := newKeptSite(t, 8<<20)
	ctx := t.Context()
	d := &tally{drill: "kill -9 of the node under load", rounds: rounds(t, 10)}
	l := s.startLoad(t)
	_, here := s.pullFiles(t, "here", 1, 32, 300_000)
	_, coming := s.pullFiles(t, "coming", 1000, 64, 1_000_000)
	local, slow := lab.StartReaders(2, here), lab.StartReaders(2, coming)
	mounts := s.mounted(t)
	l.goOn(t)
	for range d.rounds {
		local.Longest()
		wait(ctx, rand.N(time.Second))
		d.calm = append(d.calm, local.Longest())
		must(s.node.KillNode(ctx))(t)
		noError(t, goOn(ctx, local, 20))
		d.pauses = append(d.pauses, local.Longest())
	}
	l.goOn(t)
	count(t, d.drill+": mounts left over", s.mounted(t)-mounts)
	d.end(local, slow)
	l.into(t, d)
	d.rows(t)
	figure(t, d.drill+": pause p99", "s", report.AtMost, 1, d.pauses.at(0.99).Seconds())
}
