package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

const (
	// stalledReaders read what never comes, each in a thread of its own.
	stalledReaders = 500
	// stalledTimeout is the node's read_timeout.
	stalledTimeout = 10 * time.Second
)

// stalled is a site with an image of which the node has the index, and whose bytes
// never come: the supernode has lost them and the registry does not answer for them.
type stalled struct {
	*site
	gate     *lab.Gate
	file     *os.File // of that image
	complete *os.File // of one that is complete, and was mounted before it was
	n        int      // of images that were pushed
}

// push is the site's, seen through the gate.
func (s *stalled) push(t *testing.T, repository string, layers ...lab.Blob) string {
	t.Helper()
	return strings.Replace(s.site.push(t, repository, layers...), s.registry.Addr, s.gate.Addr, 1)
}

// random opens a file that the kernel does not read ahead of.
func random(t *testing.T, path string) *os.File {
	t.Helper()
	f := must(os.Open(path))(t)
	t.Cleanup(func() { _ = f.Close() })
	noError(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM))
	return f
}

func newStalled(t *testing.T) *stalled {
	t.Helper()
	ctx := t.Context()
	s := &stalled{site: newSite(t, fmt.Sprintf("read_timeout = %q", stalledTimeout))}
	s.gate = must(s.NewGate(s.registry))(t)
	bytes, _ := noisy(t, "file", 7000, 64)
	hung := s.push(t, "hung", bytes)
	noError(t, s.Pull(ctx, "shoal", hung))
	noError(t, s.supernode.Kill())
	noError(t, wipe(s.Path("super")))
	s.gate.Shut("hung")
	s.supernode = must(s.RestartSupernode(ctx, s.supernode))(t)
	noError(t, lab.WaitFor(ctx, "the node connected again", 20*time.Second, func() error {
		log, err := os.ReadFile(s.node.Log)
		if n := strings.Count(string(log), "msg=connected"); err == nil && n < 2 {
			err = fmt.Errorf("connected %d times", n)
		}
		return err
	}))
	s.file = random(t, filepath.Join(s.mountImage(t, "shoal", hung), "file"))
	here, _ := noisy(t, "file", 7001, 16)
	ref := s.push(t, "complete", here)
	noError(t, s.Pull(ctx, "shoal", ref))
	s.complete = random(t, filepath.Join(s.mountImage(t, "shoal", ref), "file"))
	noError(t, s.node.WaitLocal(ctx, ref, time.Minute))
	return s
}

// hungReads are the readers of the image that does not come.
type hungReads struct {
	stop    atomic.Bool
	wg      sync.WaitGroup
	mu      sync.Mutex
	longest time.Duration
	ended   int
	other   []error // ends other than EIO
}

// start has them all wait, and waits until the node says so.
func (h *hungReads) start(t *testing.T, s *stalled) {
	t.Helper()
	for i := range int64(stalledReaders) {
		h.wg.Go(func() {
			buf := make([]byte, 4096)
			for !h.stop.Load() {
				began := time.Now()
				_, err := s.file.ReadAt(buf, i*128<<10)
				h.note(time.Since(began), err)
			}
		})
	}
	noError(t, lab.WaitFor(t.Context(), "all reads with the node", time.Minute, func() error {
		n, err := s.node.Metric(t.Context(), `shoal_node_reads_in_flight{age="0s"}`)
		if err == nil && n < stalledReaders {
			err = fmt.Errorf("%v reads in flight", n)
		}
		return err
	}))
}

func (h *hungReads) note(took time.Duration, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended++
	h.longest = max(h.longest, took)
	if !errors.Is(err, syscall.EIO) {
		h.other = append(h.other, fmt.Errorf("after %v: %w", took, orBytes(err)))
	}
}

// orBytes is for reads that should not have been answered.
func orBytes(err error) error {
	if err == nil {
		return errors.New("it was answered with bytes")
	}
	return err
}

// end waits for their EIO.
func (h *hungReads) end() {
	h.stop.Store(true)
	h.wg.Wait()
}

// reader is an image with a program that reads a file that no other image has.
func (s *stalled) reader(t *testing.T, base lab.Blob) string {
	t.Helper()
	s.n++
	fresh, _ := noisy(t, "noise", uint64(8000+s.n), 4)
	name := fmt.Sprint("new", s.n)
	must(s.registry.Push(t.Context(), name, "v1", []string{"/bin/dd", "if=/noise", "of=/dev/null", "bs=64k"}, base, fresh))(t)
	return s.gate.Addr + "/" + name + ":v1"
}

// ddLayer has dd and what it is linked with.
func ddLayer(t *testing.T) lab.Blob {
	t.Helper()
	dd := must(exec.LookPath("dd"))(t)
	entries := []entry{file("bin/dd", string(must(os.ReadFile(dd))(t))).executable()}
	for line := range strings.Lines(string(must(exec.CommandContext(t.Context(), "ldd", dd).Output())(t))) {
		for _, f := range strings.Fields(line) {
			if strings.HasPrefix(f, "/") {
				entries = append(entries, file(f[1:], string(must(os.ReadFile(f))(t))).executable())
			}
		}
	}
	return layer(t, entries...)
}

func (e entry) executable() entry {
	e.Mode = 0o755
	return e
}

// phase is what was measured of other images, with or without the readers.
type phase struct {
	complete, missing pauses
	start             []float64 // seconds
	errs              []error
}

// timed reads a page and forgets it.
func (p *phase) timed(into *pauses, f *os.File, off int64) {
	buf := make([]byte, 4096)
	began := time.Now()
	_, err := f.ReadAt(buf, off)
	*into = append(*into, time.Since(began))
	if err != nil {
		p.errs = append(p.errs, err)
	}
	// So that the next one does not get it from the page cache.
	_ = unix.Fadvise(int(f.Fd()), off, int64(len(buf)), unix.FADV_DONTNEED)
}

// measure reads the complete image, an image whose bytes are missing but at the
// supernode, and pulls and starts a new one.
func (p *phase) measure(t *testing.T, s *stalled, missing *os.File, megabytes int, fresh string) {
	t.Helper()
	for i := range int64(400) {
		p.timed(&p.complete, s.complete, i*7919%4096*4096)
	}
	// Further apart than what comes with a read.
	for off := int64(0); off < int64(megabytes)<<20; off += 512 << 10 {
		p.timed(&p.missing, missing, off)
	}
	began := time.Now()
	noError(t, s.Pull(t.Context(), "shoal", fresh))
	if _, err := s.RunReady(t.Context(), "shoal", fresh, true); err != nil {
		p.errs = append(p.errs, err)
	}
	p.start = append(p.start, time.Since(began).Seconds())
}

// TestDrillStalled: hundreds of threads read an image whose bytes never come. Reads of
// other images, complete or not, and pulls and starts, take as long as without them;
// and the reads that hang end in time.
func TestDrillStalled(t *testing.T) {
	s := newStalled(t)
	const drill = "an image that does not come"
	pairs, megabytes := 1, 8
	if isDrill() {
		pairs, megabytes = min(rounds(t, 1), 8), 32
	}
	base := ddLayer(t)
	// The base comes with the first, and what a first start costs.
	warm := &phase{}
	warm.measure(t, s, s.complete, 0, s.reader(t, base))
	var with, without phase
	var hung hungReads
	for i := range 2 * pairs {
		stall := i%4 == 1 || i%4 == 2 // neither is always the first
		one, _ := noisy(t, "file", uint64(9000+i), megabytes)
		ref, fresh := s.push(t, fmt.Sprint("missing", i), one), s.reader(t, base)
		noError(t, s.Pull(t.Context(), "shoal", ref))
		if stall {
			hung.stop.Store(false)
			hung.start(t, s)
		}
		// Mounted as late as can be: then its bytes begin to come by themselves.
		missing := random(t, filepath.Join(s.mountImage(t, "shoal", ref), "file"))
		p := &without
		if stall {
			p = &with
		}
		p.measure(t, s, missing, megabytes, fresh)
		if stall {
			hung.end()
		}
	}
	for _, err := range slices.Concat(hung.other, with.errs, without.errs) {
		t.Log(err)
	}
	if hung.ended < stalledReaders {
		t.Errorf("%d reads have hung, want %d", hung.ended, stalledReaders)
	}
	count(t, drill+": failed reads and starts of others", len(with.errs)+len(without.errs))
	count(t, drill+": its reads that did not end with EIO", len(hung.other))
	ratio := func(name string, bar float64, with, without pauses) {
		a, b := with.at(0.99), without.at(0.99)
		figure(t, drill+": "+name+", p99 with", "ms", "", 0, a.Seconds()*1e3)
		figure(t, drill+": "+name+", p99 without", "ms", "", 0, b.Seconds()*1e3)
		figure(t, drill+": "+name+", p99 with / without", "x", report.AtMost, bar, a.Seconds()/b.Seconds())
		t.Logf("%s: with: %v; without: %v", name, with, without)
	}
	ratio("reads of a complete image", 1.5, with.complete, without.complete)
	ratio("reads of missing bytes at hand", 2, with.missing, without.missing)
	starts := make([]float64, len(with.start))
	for i := range starts {
		starts[i] = with.start[i] / without.start[i]
	}
	figure(t, drill+": pull and start of a new image, with", "s", "", 0, with.start...)
	figure(t, drill+": pull and start of a new image, without", "s", "", 0, without.start...)
	figure(t, drill+": pull and start of a new image, with / without", "x", report.AtMost, 1.5, starts...)
	figure(t, drill+": longest read until EIO, beyond read_timeout", "s", report.AtMost, 2, (hung.longest - stalledTimeout).Seconds())
	t.Logf("%d reads ended, the longest after %v", hung.ended, hung.longest)
}
