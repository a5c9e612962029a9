package volume

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// newDamaged opens a node with a layer that was complete, is mounted natively, and has a
// damaged chunk, which the node knows of and cannot fetch. It returns where the layer is
// mounted.
func newDamaged(t *testing.T, change func(*Config)) (n *node, l *layer, chunk blockdev.Chunk, native string) {
	t.Helper()
	n = newNode(t, func(c *Config) {
		c.Cache.Timeout, c.ReadTimeout = 100e6, 200e6
		change(c)
	})
	l = newLayer(t, 90, 3<<20)
	n.add(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	native, chunk = n.mountDir(l), l.index.Chunks[10]
	n.damageKnown(l, chunk)
	return n, l, chunk, native
}

// damageKnown damages a chunk, has the node find that, and lets it fetch nothing.
func (n *node) damageKnown(l *layer, c blockdev.Chunk) {
	n.t.Helper()
	n.src.turn(blockdev.ErrUnavailable)
	n.flip(l, c)
	if err := n.peerReads(l, c); !errors.Is(err, blockdev.ErrUnavailable) {
		n.t.Fatalf("peer's read: %v", err)
	}
}

// refuses checks that a chunk cannot be read below dir.
func (n *node) refuses(l *layer, dir string, c blockdev.Chunk) {
	n.t.Helper()
	f, err := os.Open(filepath.Join(newContainer(n.t, dir).dir, "file"))
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, c.Length), c.Offset); err == nil {
		n.t.Error("damaged bytes were read")
	}
}

// TestMarkerWithoutMount: a process that was killed when it had marked a lazy mount, and
// had not made it, leaves a native mount. The next one does not count that as lazy, so that
// containers that start get no bytes that are known to be wrong.
func TestMarkerWithoutMount(t *testing.T) {
	for name, loop := range map[string]bool{"file": false, "loop": true} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper(t)
			n, l, chunk, native := newDamaged(t, func(c *Config) { c.Keep, c.Loop = k, loop })
			marked := native // its devices are switched
			if !loop {
				marked = n.mounts.free(l.id, "", []string{native})
			}
			if err := n.mounts.mark(l.id, marked); err != nil {
				t.Fatal(err)
			}
			n.restart()
			dir := n.mountDir(l)
			if s := n.stat(l); !s.Lazy {
				t.Errorf("%+v", s)
			}
			n.refuses(l, dir, chunk)
			n.src.turn(nil)
			n.Prefetch(l.id)
			n.eventually("it is complete and native again", func() bool { return n.stat(l).Complete && !n.stat(l).Lazy })
			n.check(l, n.mountDir(l))
		})
	}
}

// TestMarkerOfHealthy: a marker of a mount that was not made is no reason to touch another
// one of the diff, also if the FUSE connection is lost.
func TestMarkerOfHealthy(t *testing.T) {
	var log syncBuffer
	n := newNode(t, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	l := newLayer(t, 91, 1<<20)
	n.add(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	dir := n.mountDir(l)
	id := mountID(t, dir)
	if err := n.mounts.mark(l.id, n.mounts.free(l.id, "", []string{dir})); err != nil {
		t.Fatal(err)
	}
	n.restart()
	if n.mountDir(l) != dir || mountID(t, dir) != id {
		t.Errorf("the native mount was made again: %+v", n.stat(l))
	}
	if n.mounts.marked(l.id) {
		t.Error("the marker is left")
	}
	if log.has("cannot take over lazy mounts") {
		t.Errorf("the log has an error about lazy mounts:\n%s", log.b.String())
	}
}

// syncBuffer keeps what is logged.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) has(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Contains(s.b.Bytes(), []byte(text))
}

// TestMarkerOfFailedMount: a lazy mount that fails leaves no marker beside a native one.
func TestMarkerOfFailedMount(t *testing.T) {
	n, l, _, native := newDamaged(t, func(*Config) {})
	place := n.mounts.free(l.id, "", []string{native})
	if err := os.WriteFile(place, nil, 0o600); err != nil { // nothing can be mounted there
		t.Fatal(err)
	}
	if dir := n.mountDir(l); dir != native || n.stat(l).Lazy {
		t.Fatalf("%+v", n.stat(l))
	}
	if n.mounts.marked(l.id) {
		t.Error("the marker is left")
	}
}

// TestMountedAgainAtItsPlace: a lazy mount that had to go to another mount point than the
// first is there again after a restart that has lost the FUSE connection.
func TestMountedAgainAtItsPlace(t *testing.T) {
	n, l, chunk, native := newDamaged(t, func(*Config) {})
	dir := n.mountDir(l)
	if dir == native || !n.stat(l).Lazy {
		t.Fatalf("%+v", n.stat(l))
	}
	n.restart()
	if again := n.mountDir(l); again != dir || !n.stat(l).Lazy {
		t.Errorf("mounted at %s, before at %s: %+v", again, dir, n.stat(l))
	}
	n.refuses(l, dir, chunk)
}

// TestLostWithOlder: if the FUSE connection is lost, then a lazy mount that had been replaced
// is not taken over either, though the marker does not name it.
func TestLostWithOlder(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 92, 1<<20)
	n.add(l)
	n.mountDir(l) // lazy, and retired below
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	native := n.mountDir(l)
	// As after damage: lazy again, and the native mount is tidied up before the busy older one.
	lazy := n.mounts.places(l.id)[3]
	_, err := mount.Mount(n.diffFile(l, "meta"), n.mounts.fusePath(l.id), mkdir(t, lazy), mount.Options{})
	if err := errors.Join(err, n.mounts.mark(l.id, lazy), mount.Detach(native)); err != nil {
		t.Fatal(err)
	}
	n.restart()
	dir := n.mountDir(l)
	n.check(l, dir)
	if s := n.stat(l); s.Lazy || dir != lazy || len(n.allMounts()) != 1 {
		t.Errorf("%+v; mounts: %+v", s, n.allMounts())
	}
}

func mkdir(t *testing.T, dir string) string {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}
