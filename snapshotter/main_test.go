package snapshotter

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Geteuid() == 0 {
		// containerd's test suite skips what needs root unless its flag is set.
		if err := flag.Set("test.root", "true"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
	goleak.VerifyTestMain(m)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: overlayfs mounts, device nodes, owners")
	}
}

// logBuffer keeps what is logged.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// lines with all of the words in them.
func (l *logBuffer) lines(words ...string) (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
next:
	for line := range strings.SplitSeq(l.b.String(), "\n") {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		if line != "" {
			found = append(found, line)
		}
	}
	return found
}

// node is a snapshotter under test with what it talks to.
type node struct {
	*Snapshotter
	root   string
	data   *fakeData
	images *fakeImages
	log    *logBuffer
	t      testing.TB
}

func newNode(t testing.TB, change ...func(*Config)) *node {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	n := &node{root: filepath.Join(dir, "snap"), data: newFakeData(t, filepath.Join(dir, "data")), images: newFakeImages(), log: &logBuffer{}, t: t}
	n.start(change...)
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *node) start(change ...func(*Config)) {
	n.t.Helper()
	cfg := Config{Root: n.root, Data: n.data, Images: n.images, Log: slog.New(slog.NewTextHandler(n.log, nil))}
	for _, c := range change {
		c(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Snapshotter = s
}

// crash goes on with a copy of the directory as a kill would leave it, with a
// snapshotter that was never told to end.
func (n *node) crash(change ...func(*Config)) {
	n.t.Helper()
	old := n.Snapshotter
	n.t.Cleanup(func() { _ = old.Close() })
	to := filepath.Join(filepath.Dir(n.root), "after-"+filepath.Base(n.root))
	if err := copyTree(n.root, to); err != nil {
		n.t.Fatal(err)
	}
	n.root = to
	n.start(change...)
}

func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		dst := filepath.Join(to, rel)
		if d.IsDir() {
			fi, err := d.Info()
			if err != nil {
				return err
			}
			return os.MkdirAll(dst, fi.Mode().Perm())
		}
		if !d.Type().IsRegular() {
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return os.WriteFile(dst, b, 0o600)
	})
}

// mounted mounts what the snapshotter answered, until the test ends.
func mounted(t testing.TB, mounts []mount.Mount) string {
	t.Helper()
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatalf("mount %v: %v", mounts, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func read(t testing.TB, p ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var bg = context.Background()
