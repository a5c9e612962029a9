package volume

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/mount"
	"github.com/shoalfs/shoal/blockdev/mount/mounttest"
)

func TestMain(m *testing.M) { os.Exit(mounttest.Main(m)) }

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE and EROFS")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs FUSE: ", err)
	}
}

// layer is a layer with one file, "file".
type layer struct {
	*blockdevtest.Layer
	id      blockdev.Digest
	index   *blockdev.Index
	encoded []byte
	data    []byte // the masked diff
	content []byte // of the file
}

func newLayer(t testing.TB, seed uint64, size int) *layer {
	t.Helper()
	content := blockdevtest.Bytes(seed, size)
	l, err := blockdevtest.NewLayer(blockdevtest.File{Name: "file", Data: content})
	if err != nil {
		t.Fatal(err)
	}
	enc, err := index.Encode(l.Index)
	if err != nil {
		t.Fatal(err)
	}
	return &layer{l, l.Index.DiffID, l.Index, enc, l.Masked, content}
}

// source is a Source that can be turned off.
type source struct {
	blockdevtest.Memory
	mu  sync.Mutex
	off error
}

func (s *source) turn(off error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.off = off
}

func (s *source) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	s.mu.Lock()
	off := s.off
	s.mu.Unlock()
	if off != nil {
		return off
	}
	return s.Memory.Fetch(ctx, req, deliver)
}

// node is a Manager with what belongs to it.
type node struct {
	*Manager
	t    testing.TB
	root string
	src  *source
	cfg  Config
	up   Upstream
}

// newNode opens a Manager and attaches src, or what upstream makes of that.
func newNode(t testing.TB, change func(*Config), upstream ...func(*Upstream)) *node {
	t.Helper()
	needRoot(t)
	n := &node{t: t, root: filepath.Join(t.TempDir(), "root"), src: &source{}}
	n.cfg = Config{
		Root: n.root, ReadTimeout: 10 * time.Second,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	n.cfg.Cache.Timeout = 5 * time.Second
	if change != nil {
		change(&n.cfg)
	}
	n.up.Source = n.src
	for _, change := range upstream {
		change(&n.up)
	}
	n.open()
	t.Cleanup(func() {
		if err := n.UnmountAll(context.Background()); err != nil {
			t.Errorf("unmount all: %v", err)
			left, _ := mount.List(n.root)
			for i := range left {
				_ = mount.Detach(left[len(left)-1-i].Dir)
			}
		}
		if left, err := mount.List(n.root); err != nil || len(left) > 0 {
			t.Errorf("left behind: %+v, %v", left, err)
		}
	})
	return n
}

func (n *node) open() {
	n.t.Helper()
	m, err := Open(context.Background(), n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Manager = m
	if err := m.Attach(n.up); err != nil {
		n.t.Fatal(err)
	}
}

// restart is what a new process does after the old one has gone.
func (n *node) restart() {
	n.t.Helper()
	if err := n.Close(); err != nil {
		n.t.Fatal(err)
	}
	n.open()
}

func (n *node) add(l *layer) {
	n.t.Helper()
	n.src.PutLayer(l.Layer)
	id, err := n.Add(context.Background(), l.encoded)
	if err != nil || id != l.id {
		n.t.Fatalf("add: %v, %v", id, err)
	}
}

func (n *node) mountDir(l *layer) string {
	n.t.Helper()
	dir, err := n.Mount(context.Background(), l.id)
	if err != nil {
		n.t.Fatal(err)
	}
	return dir
}

func (n *node) stat(l *layer) Stat {
	n.t.Helper()
	s, ok := n.Stat(l.id)
	if !ok {
		n.t.Fatal("no such diff")
	}
	return s
}

func (n *node) check(l *layer, dir string) {
	n.t.Helper()
	got, err := os.ReadFile(filepath.Join(dir, "file"))
	if err != nil || !bytes.Equal(got, l.content) {
		n.t.Fatalf("file in %s: %d bytes, %v, or other bytes", dir, len(got), err)
	}
}

// checkPart reads n bytes at off.
func (n *node) checkPart(l *layer, f *os.File, off int64, size int) {
	n.t.Helper()
	buf := make([]byte, size)
	if _, err := f.ReadAt(buf, off); err != nil && err != io.EOF || !bytes.Equal(buf, l.content[off:off+int64(size)]) {
		n.t.Fatalf("read at %d: %v, or other bytes", off, err)
	}
}

// UnmountAll unmounts every diff and the FUSE mount, and closes the Manager. A
// diff that is in use stays mounted, and the error wraps mount.ErrBusy; if it
// was lazy, the FUSE mount stays too, though no process serves it.
func (m *Manager) UnmountAll(ctx context.Context) error {
	m.mu.RLock()
	vols := make([]*volume, 0, len(m.vols))
	for _, v := range m.vols {
		vols = append(vols, v)
	}
	m.mu.RUnlock()
	var errs []error
	for _, v := range vols {
		if err := v.take(ctx); err != nil {
			errs = append(errs, err)
			break
		}
		errs = append(errs, m.mounts.unmount(v, false))
		v.give()
	}
	errs = append(errs, mount.Unmount(filepath.Join(m.root, fuseDir)), m.dropConnection(), m.Close())
	return errors.Join(errs...)
}

// dropConnection undoes connection.keep.
func (m *Manager) dropConnection() error {
	if m.cfg.Keep == nil {
		return nil
	}
	return errors.Join(m.cfg.Keep.Drop(keptFUSE), m.cfg.Keep.Drop(keptPending), m.cfg.Keep.Drop(keptInit))
}
