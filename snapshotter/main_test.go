package snapshotter

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/images"
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

// node is a snapshotter under test, its catalogue, and what they talk to.
type node struct {
	*Snapshotter
	*images.Catalogue
	root   string
	data   *fakeData
	images *fakeImages
	log    *logBuffer
	t      testing.TB
	// crashed, if not nil, changes what a kill has left.
	crashed func()
}

func newNode(t testing.TB, change ...func(*nodeConfig)) *node {
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

// nodeConfig is what a test may change.
type nodeConfig struct {
	images.Config
	PrepareTimeout time.Duration
}

func (n *node) start(change ...func(*nodeConfig)) {
	n.t.Helper()
	cfg := nodeConfig{Config: images.Config{Root: n.root, Data: n.data, Images: n.images, Log: slog.New(slog.NewTextHandler(n.log, nil))}}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if n.Snapshotter, n.Catalogue, err = open(cfg); err != nil {
		n.t.Fatal(err)
	}
}

// open makes a snapshotter with its catalogue.
func open(cfg nodeConfig) (*Snapshotter, *images.Catalogue, error) {
	c, err := images.Open(cfg.Config)
	if err != nil {
		return nil, nil, err
	}
	s, err := New(Config{Root: cfg.Root, Images: c, PrepareTimeout: cfg.PrepareTimeout, Log: cfg.Log})
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	return s, c, nil
}

func (n *node) Close() error { return errors.Join(n.Snapshotter.Close(), n.Catalogue.Close()) }

func (n *node) Cleanup(ctx context.Context) error { return n.Snapshotter.Cleanup(ctx) }

func (n *node) Check(ctx context.Context, repair bool) (*Health, error) {
	return n.Snapshotter.Check(ctx, repair)
}

// recorded returns the diffs on record: in shoal.db as a kill would leave it.
func (n *node) recorded() (ids []blockdev.Digest) {
	n.t.Helper()
	path := filepath.Join(n.t.TempDir(), images.File)
	check(n.t, os.WriteFile(path, []byte(read(n.t, n.root, images.File)), 0o600))
	db := must(bolt.Open(path, 0o600, nil))(n.t)
	check(n.t, db.View(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("diffs")).ForEach(func(id, _ []byte) error {
			ids = append(ids, blockdev.Digest(id))
			return nil
		})
	}))
	check(n.t, db.Close())
	return ids
}

// crash goes on with a copy of the directory as a kill would leave it, with a
// snapshotter that was never told to end.
func (n *node) crash(change ...func(*nodeConfig)) {
	n.t.Helper()
	old := *n
	n.t.Cleanup(func() { _ = old.Close() })
	to := filepath.Join(filepath.Dir(n.root), "after-"+filepath.Base(n.root))
	if err := copyTree(n.root, to); err != nil {
		n.t.Fatal(err)
	}
	n.root = to
	if n.crashed != nil {
		n.crashed()
	}
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
