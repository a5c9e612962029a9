package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// Drills break one thing at a time, again and again, while containers read. In
// make test each is short, and what goes wrong fails the test; make drill sets
// SHOAL_ROUNDS and SHOAL_DRILL_OUT, and what goes wrong is a row of the report: it
// fails only where nothing could be measured.

// drills collects the rows of all drills of this run.
var drills struct {
	sync.Mutex
	report.Report
}

// count adds a row for things of which there must be none.
func count(t *testing.T, name string, n int) {
	t.Helper()
	figure(t, name, "", report.AtMost, 0, float64(n))
	if n > 0 && os.Getenv("SHOAL_DRILL_OUT") == "" {
		t.Errorf("%s: %d", name, n)
	}
}

// figure adds a row with a bar that no test should depend on, such as a time.
func figure(t *testing.T, name, unit string, cmp report.Cmp, bar float64, samples ...float64) {
	t.Helper()
	if len(samples) == 0 {
		t.Fatalf("%s: nothing was measured", name)
	}
	drills.Lock()
	defer drills.Unlock()
	drills.Add(name, unit, cmp, bar, samples...)
}

func TestMain(m *testing.M) {
	code := m.Run()
	if out := os.Getenv("SHOAL_DRILL_OUT"); out != "" {
		if err := errors.Join(drills.Print(os.Stdout), drills.Save(out, "drill")); err != nil {
			println(err.Error())
			code = 1
		}
	}
	os.Exit(code)
}

// TestDrillKill kills the node at random moments, while four containers work and
// two programs outside read, one of them what is still being fetched.
func TestDrillKill(t *testing.T) {
	s := newKeptSite(t, 8<<20)
	ctx := t.Context()
	ref := s.registry.Addr + "/" + loadImage(t, s.registry, realRegistry(t, s.Lab, "python-django")) + ":v1"
	noError(t, s.Pull(ctx, "shoal", ref))
	l := startLoad(t, s.site, ref)
	_, here := s.pullFiles(t, "here", 1, 32, 300_000)
	_, coming := s.pullFiles(t, "coming", 1000, 64, 1_000_000)
	local, slow := lab.StartReaders(2, here), lab.StartReaders(2, coming)
	l.goOn(t)
	n := rounds(t, 5)
	var pauses []float64
	for range n {
		wait(ctx, rand.N(time.Second))
		local.Longest()
		must(s.node.KillNode(ctx))(t)
		before := local.Reads()
		noError(t, lab.WaitFor(ctx, "reads after a kill", 30*time.Second, func() error {
			if n := local.Reads() - before; n < 20 {
				return fmt.Errorf("%d reads", n)
			}
			return nil
		}))
		pauses = append(pauses, local.Longest().Seconds())
	}
	l.goOn(t)
	var failed []string
	for _, err := range append(local.Stop(), slow.Stop()...) {
		failed = append(failed, err.Error())
	}
	good, bad := l.end(t)
	for _, f := range append(failed, bad...) {
		t.Log(f)
	}
	slices.Sort(pauses)
	t.Logf("%d kills, %d reads of local bytes, %d of bytes on their way, %d rounds in containers", n, local.Reads(), slow.Reads(), good)
	count(t, fmt.Sprintf("kill -9 of the node under load, %d rounds: failed or wrong reads", n), len(failed)+len(bad))
	figure(t, "kill -9 of the node under load: pause p99", "s", report.AtMost, 1, pauses[len(pauses)*99/100])
}
