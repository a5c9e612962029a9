package snapshotter

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// found says whether a finding's Where ends so.
func found(h *Health, where string) (f blockdev.Finding, ok bool) {
	for _, f := range h.Findings {
		if strings.HasSuffix(f.Where, where) {
			return f, true
		}
	}
	return f, false
}

// stopped ends the snapshotter, runs f on its directory and starts it again.
func (n *node) stopped(f func()) {
	n.t.Helper()
	check(n.t, n.Close())
	f()
	n.start()
}

func TestCheckOnline(t *testing.T) {
	n := newNode(t)
	used := newImage("registry.test/used:1", threeLayers(t)...)
	n.images.publish(used)
	_, _, err := n.pull(bg, used)
	check(t, err)
	h := must(n.Check(bg, false))(t)
	if len(h.Findings) != 0 || h.Databases != 2 || h.Snapshots == 0 {
		t.Errorf("all is well: %+v", h)
	}
	check(t, os.MkdirAll(filepath.Join(n.root, "s/999/fs"), 0o700))
	if h := must(n.Check(bg, false))(t); len(h.Findings) != 0 {
		t.Errorf("what the next cleanup removes: %+v", h)
	}
	h = must(n.Check(bg, true))(t)
	if f, ok := found(h, "s/999"); !ok || f.Repaired == "" || len(h.Findings) != 1 {
		t.Errorf("repair: %+v", h)
	}
	if _, err := Inspect(bg, n.root, false); !errors.Is(err, boltcheck.ErrInUse) {
		t.Errorf("beside a running one: %v", err)
	}
}

func TestInspect(t *testing.T) {
	n := newNode(t)
	used := newImage("registry.test/used:1", threeLayers(t)...)
	n.images.publish(used)
	_, _, err := n.pull(bg, used)
	check(t, err)
	n.stopped(func() {
		if h := must(Inspect(bg, n.root, false))(t); len(h.Findings) != 0 || h.Databases != 2 || h.Snapshots == 0 {
			t.Errorf("all is well: %+v", h)
		}
		check(t, os.MkdirAll(filepath.Join(n.root, "l/999"), 0o700))
		h := must(Inspect(bg, n.root, false))(t)
		if len(h.Findings) != 0 {
			t.Errorf("what the next start removes: %+v", h)
		}
		h = must(Inspect(bg, n.root, true))(t)
		if f, ok := found(h, "l/999"); !ok || f.Repaired == "" {
			t.Errorf("repair of an orphan: %+v", h)
		}
		if h := must(Inspect(bg, n.root, true))(t); len(h.Findings) != 0 {
			t.Errorf("after the repair: %+v", h)
		}
	})
}

// TestDamagedRecords: shoal.db is set aside, and nothing that is in use goes with it.
func TestDamagedRecords(t *testing.T) {
	n := newNode(t)
	used := newImage("registry.test/used:1", threeLayers(t)...)
	n.images.publish(used)
	top, _, err := n.pull(bg, used)
	check(t, err)
	n.stopped(func() {
		check(t, os.WriteFile(filepath.Join(n.root, images.File), bytes.Repeat([]byte("garbage "), 4096), 0o600))
		h := must(Inspect(bg, n.root, true))(t)
		if _, ok := found(h, images.File); !ok {
			t.Errorf("not found: %+v", h)
		}
	})
	must(n.Prepare(bg, "ns/1/c", top))(t)
	check(t, n.Cleanup(bg))
	for _, l := range used.layers {
		if !n.data.has(l) {
			t.Error("a diff in use is gone")
		}
	}
	if h := must(n.Check(bg, false))(t); len(h.Findings) != 1 || !strings.HasSuffix(h.Findings[0].Where, images.File+asideSuffix) {
		t.Errorf("want what was set aside: %+v", h)
	}
}

// TestDamagedMetadata: metadata.db is set aside with the directories that containers
// write to, and no diff is removed, since nobody knows which are in use; the same if
// it is not there any more.
func TestDamagedMetadata(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"damaged": func(path string) error { return os.WriteFile(path, bytes.Repeat([]byte("garbage "), 4096), 0o600) },
		"missing": os.Remove,
		"empty":   func(path string) error { return os.Truncate(path, 0) },
	} {
		t.Run(name, func(t *testing.T) { damageMetadata(t, spoil) })
	}
}

func damageMetadata(t *testing.T, spoil func(path string) error) {
	n := newNode(t)
	used := newImage("registry.test/used:1", threeLayers(t)...)
	n.images.publish(used)
	top, _, err := n.pull(bg, used)
	check(t, err)
	mounts := must(n.Prepare(bg, "ns/1/c", top))(t)
	var upper string
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			upper = dir
		}
	}
	check(t, os.WriteFile(filepath.Join(upper, "precious"), []byte("data"), 0o600))
	n.stopped(func() {
		check(t, spoil(filepath.Join(n.root, metadataFile)))
		// A check of a node that is not running sees it, and does no harm.
		if h := must(Inspect(bg, n.root, true))(t); len(h.Findings) != 1 || h.Findings[0].Where != metadataFile {
			t.Errorf("check: %+v", h)
		}
	})
	check(t, n.Cleanup(bg))
	for _, l := range used.layers {
		if !n.data.has(l) {
			t.Error("a diff that may be in use is gone")
		}
	}
	rel := must(filepath.Rel(filepath.Join(n.root, "s"), upper))(t)
	if b, err := os.ReadFile(filepath.Join(n.root, "s"+asideSuffix, rel, "precious")); err != nil || string(b) != "data" {
		t.Errorf("what a container wrote: %q, %v", b, err)
	}
	// The image can be pulled again, and what was set aside, deleted.
	if _, _, err := n.pull(bg, used); err != nil {
		t.Error(err)
	}
	h := must(n.Check(bg, false))(t)
	if _, ok := found(h, "s"+asideSuffix); !ok || len(h.Findings) != 2 {
		t.Errorf("want what was set aside: %+v", h)
	}
}
