package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// loadImage pushes the image that the drills read: python-django, and on top of it
// the programs of testdata/load with fio and a file that fio wrote. It returns the
// image's repository; its tag is v1.
func loadImage(t *testing.T, to *lab.Registry, real *lab.Registry) string {
	t.Helper()
	ctx := t.Context()
	base := must(real.Image(ctx, "python-django", "v1"))(t)
	layers := make([]lab.Blob, 0, len(base.Layers)+1)
	for _, l := range base.Layers {
		data := must(real.Blob(ctx, "python-django", l.Digest))(t)
		l.Data = data
		layers = append(layers, l)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(name string, mode int64, data []byte) {
		noError(t, w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(data)), ModTime: mtime, Format: tar.FormatPAX}))
		_, err := w.Write(data)
		noError(t, err)
	}
	for _, name := range []string{"cat.sh", "import.sh", "db.py", "fio.sh"} {
		add("drill/"+name, 0o755, must(os.ReadFile(filepath.Join("testdata", "load", name)))(t))
	}
	fio := must(exec.LookPath("fio"))(t)
	add("drill/fio", 0o755, must(os.ReadFile(fio))(t))
	for line := range strings.Lines(string(must(exec.CommandContext(ctx, "ldd", fio).Output())(t))) {
		for _, f := range strings.Fields(line) {
			if strings.HasPrefix(f, "/") {
				add("drill/lib/"+filepath.Base(f), 0o755, must(os.ReadFile(f))(t))
			}
		}
	}
	written := filepath.Join(t.TempDir(), "fio.bin")
	cmd := exec.CommandContext(ctx, fio, "--name=v", "--filename="+written, "--rw=randwrite", "--bs=64k", "--size=32m",
		"--ioengine=psync", "--verify=crc32c", "--do_verify=0")
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("fio: %v\n%s", err, out)
	}
	add("drill/fio.bin", 0o644, must(os.ReadFile(written))(t))
	noError(t, w.Close())
	layers = append(layers, must(lab.GzipLayer(b.Bytes()))(t))
	must(to.Push(ctx, "load", "v1", []string{"/bin/true"}, layers...))(t)
	return "load"
}

// load is what runs in containers while something is being broken: fio with check
// sums, a thousand files read again and again, a large Python import, a database.
type load struct {
	ref        string
	containers []*lab.Container
	failed     []error
	stop       context.CancelFunc
	dropping   chan error // of the loop that empties the page cache
}

// startLoad pulls the image and starts the containers.
func (s *site) startLoad(t *testing.T) *load {
	t.Helper()
	ref := s.registry.Addr + "/" + loadImage(t, s.registry, realRegistry(t, s.Lab, "python-django")) + ":v1"
	noError(t, s.Pull(t.Context(), "shoal", ref))
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	l := &load{ref: ref, stop: stop, dropping: make(chan error, 1)}
	for name, args := range map[string][]string{
		"cat": {"/bin/bash", "/drill/cat.sh"}, "import": {"/bin/bash", "/drill/import.sh"},
		"db": {"python3", "-B", "/drill/db.py"}, "fio": {"/bin/bash", "/drill/fio.sh"},
	} {
		l.containers = append(l.containers, must(s.StartContainer(t.Context(), name, "shoal", ref, args...))(t))
	}
	// What the page cache answers does not reach the node.
	go func() { l.dropping <- dropCaches(ctx) }()
	t.Cleanup(func() { l.end(t) })
	return l
}

// dropCaches empties the page cache every second until ctx ends.
func dropCaches(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0o200); err != nil {
			return err
		}
		wait(ctx, time.Second)
	}
	return nil
}

// rounds counts how often each container has said that all is well.
func (l *load) rounds(t *testing.T) map[string]int {
	t.Helper()
	good := map[string]int{}
	for _, c := range l.containers {
		good[c.Name] = strings.Count(string(must(os.ReadFile(c.Log))(t)), "OK\n")
	}
	return good
}

// goOn waits until every container has gone round once more.
func (l *load) goOn(t *testing.T) {
	t.Helper()
	before := l.rounds(t)
	noError(t, lab.WaitFor(t.Context(), "the containers' next round", 2*time.Minute, func() error {
		for name, n := range l.rounds(t) {
			if n == before[name] {
				return fmt.Errorf("%s is where it was", name)
			}
		}
		return nil
	}))
}

// into stops the load, and counts what it has seen: a round as a read.
func (l *load) into(t *testing.T, d *tally) {
	t.Helper()
	good, failed := l.end(t)
	d.add(int64(good), failed...)
}

// end stops the load, and returns how many rounds went well in all, and what did
// not: with lab.ErrWrong where a container has found wrong bytes. It may be called
// more than once.
func (l *load) end(t *testing.T) (good int, failed []error) {
	t.Helper()
	for _, n := range l.rounds(t) {
		good += n
	}
	for _, c := range l.containers {
		if err := c.Alive(); err != nil {
			l.failed = append(l.failed, err)
		}
		noError(t, c.End())
		for line := range strings.Lines(string(must(os.ReadFile(c.Log))(t))) {
			line = strings.TrimSpace(line)
			switch {
			case line == "OK", strings.HasPrefix(line, "time="): // ctr's own lines begin with a time
			case strings.HasPrefix(line, "WRONG"):
				l.failed = append(l.failed, fmt.Errorf("%s: %s: %w", c.Name, line, lab.ErrWrong))
			default:
				l.failed = append(l.failed, fmt.Errorf("%s: %s", c.Name, line))
			}
		}
	}
	if l.containers != nil {
		l.stop()
		noError(t, <-l.dropping)
	}
	l.containers = nil
	return good, l.failed
}
