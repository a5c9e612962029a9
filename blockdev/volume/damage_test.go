package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// flip changes a bit of a chunk on disk.
func (n *node) flip(l *layer, c blockdev.Chunk) {
	n.t.Helper()
	f, err := os.OpenFile(n.diffFile(l, "data"), os.O_RDWR, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	b := []byte{0}
	_, err = f.ReadAt(b, c.Offset+100)
	b[0] ^= 1
	_, werr := f.WriteAt(b, c.Offset+100)
	if err := errors.Join(err, werr, f.Sync(), f.Close()); err != nil {
		n.t.Fatal(err)
	}
}

// TestDamageFoundByPeer: damage beneath a native mount that another node's request
// finds is mended, and containers read right bytes after that: those on the mount
// that is there, and those on the lazy one that it has replaced.
func TestDamageFoundByPeer(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 80, 3<<20)
	n.add(l)
	old := newContainer(t, n.mountDir(l))
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	young := newContainer(t, n.mountDir(l))
	c := l.index.Chunks[10]
	n.flip(l, c)
	for _, c := range []*container{old, young} {
		if err := c.read(l); err == nil {
			t.Fatal("what was flipped is not read")
		}
	}
	if err := n.peerReads(l, c); err != nil {
		t.Errorf("peer's read: %v", err)
	}
	if n.Counters().DamagedChunks != 1 {
		t.Errorf("%d damaged chunks were found", n.Counters().DamagedChunks)
	}
	n.eventually("it is complete again", func() bool { return n.stat(l).Complete && n.stat(l).Prefetch == Idle })
	for who, c := range map[string]*container{"old": old, "new": young} {
		n.eventually(who+" container reads right bytes", func() bool {
			got, err := os.ReadFile(filepath.Join(c.dir, "file")) // from the page cache, if it has them
			return err == nil && string(got) == string(l.content)
		})
	}
	if n.stat(l).Lazy {
		t.Errorf("%+v", n.stat(l))
	}
}

// peerReads asks for a chunk as another node does, and fails if it gets wrong bytes.
func (n *node) peerReads(l *layer, c blockdev.Chunk) error {
	n.t.Helper()
	f, err := n.Forward(l.id, blockdev.Prefetch, 0, []blockdev.Digest{c.Digest})
	if err != nil {
		return err
	}
	b, err := f.Chunk(n.t.Context(), 0, func(size int) []byte { return make([]byte, size) })
	if err == nil && blockdev.Sum(b) != c.Digest {
		n.t.Error("a peer gets wrong bytes")
	}
	return err
}

// TestDamageWithoutSource: as long as what is damaged cannot be had, containers that
// start get an error for it, and no wrong bytes.
func TestDamageWithoutSource(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Cache.Timeout, c.ReadTimeout = 100e6, 200e6 })
	l := newLayer(t, 81, 3<<20)
	n.add(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	dir := n.mountDir(l)
	n.src.turn(blockdev.ErrUnavailable)
	c := l.index.Chunks[10]
	n.flip(l, c)
	if err := n.peerReads(l, c); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("peer's read: %v", err)
	}
	again := newContainer(t, n.mountDir(l))
	f, err := os.Open(filepath.Join(again.dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, c.Length), c.Offset); err == nil {
		t.Error("damaged bytes were read")
	}
	n.restart() // nor is it forgotten
	if s := n.stat(l); s.Complete || s.Prefetch == Idle {
		t.Errorf("after a restart: %+v", s)
	}
	n.src.turn(nil)
	n.Prefetch(l.id) // at once
	n.eventually("it is complete and native again", func() bool { return n.stat(l).Complete && !n.stat(l).Lazy })
	n.check(l, dir)
}

// TestDamageOfIncomplete: what is not complete, and was not, is fetched again when it
// is read, not all of it at once.
func TestDamageOfIncomplete(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Cache.ReadAhead = -1 })
	l := newLayer(t, 82, 3<<20)
	n.add(l)
	c := newContainer(t, n.mountDir(l))
	f, err := os.Open(filepath.Join(c.dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n.checkPart(l, f, 0, 1<<20)
	n.cache.Sync(t.Context())
	chunk := l.index.Chunks[2]
	n.flip(l, chunk)
	if err := forget(c.dir); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	if _, err := f.ReadAt(buf, 0); err != nil || string(buf) == string(l.content[:1<<20]) {
		t.Fatalf("what was flipped is not read: %v", err)
	}
	if err := n.peerReads(l, chunk); err != nil {
		t.Errorf("peer's read: %v", err)
	}
	n.eventually("right bytes are read", func() bool {
		_, err := f.ReadAt(buf, 0)
		return err == nil && string(buf) == string(l.content[:1<<20])
	})
	if s := n.stat(l); s.Prefetch != Idle || s.Local > 2<<20 {
		t.Errorf("all of it is fetched: %+v", s)
	}
}

// TestRemoveInterrupted: who asked for a removal has gone. It goes on to its end, or
// has not begun, and the layer can be mounted and added in any case.
func TestRemoveInterrupted(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 83, 3<<20)
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	removed := 0
	for range 20 { // the turn and the end of the context come at once: either may be first
		n.add(l)
		n.check(l, n.mountDir(l))
		err := n.Remove(gone, l.id)
		switch {
		case err == nil && !n.Has(l.id):
			removed++
		case errors.Is(err, context.Canceled) && n.Has(l.id):
			n.check(l, n.mountDir(l))
		default:
			t.Errorf("remove: %v, has it: %v", err, n.Has(l.id))
		}
	}
	if removed == 0 {
		t.Error("no removal was begun")
	}
}

// TestRemovedBeneath: a diff that the cache has lost under its mount can be added again.
func TestRemovedBeneath(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 84, 1<<20)
	n.add(l)
	n.mountDir(l)
	if err := n.cache.Remove(t.Context(), l.id); err != nil {
		t.Fatal(err)
	}
	n.add(l)
	n.check(l, n.mountDir(l))
}
