package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/control"
)

// exitStatus is what main would end with.
func exitStatus(err error) int {
	var status *exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return status.code
	default:
		return 1
	}
}

// nodeRoot makes a data directory with one complete, proven layer.
func nodeRoot(t *testing.T) (root string, id blockdev.Digest) {
	t.Helper()
	l, err := blockdevtest.NewLayer(blockdevtest.File{Name: "f", Data: blockdevtest.Bytes(1, 1<<20)})
	if err != nil {
		t.Fatal(err)
	}
	src := &blockdevtest.Memory{}
	src.PutLayer(l)
	root = t.TempDir()
	c, err := cache.Open(t.Context(), cache.Config{Root: root, Source: src, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	enc, err := index.Encode(l.Index)
	if err != nil {
		t.Fatal(err)
	}
	d, err := c.Add(t.Context(), enc)
	if err == nil {
		err = d.Prefetch(t.Context())
	}
	if err == nil {
		err = d.Prove(t.Context(), true)
	}
	if err := errors.Join(err, c.Close()); err != nil {
		t.Fatal(err)
	}
	return root, l.Index.DiffID
}

func flip(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := []byte{0}
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 4
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// TestCheckRoot: every flipped bit is found, said, repaired on demand, and gone after.
func TestCheckRoot(t *testing.T) {
	clean := func(t *testing.T, root string) {
		t.Helper()
		out, err := shoal(t, "check", "--root", root)
		if exitStatus(err) != 0 || !strings.HasSuffix(out, "clean\n") {
			t.Fatalf("status %d, %v:\n%s", exitStatus(err), err, out)
		}
	}
	for name, c := range map[string]struct {
		damage func(t *testing.T, diff string)
		says   string
	}{
		"data":       {func(t *testing.T, d string) { flip(t, filepath.Join(d, "data"), 5000) }, "do not match their digests"},
		"index":      {func(t *testing.T, d string) { flip(t, filepath.Join(d, "index"), 150) }, "index"},
		"meta":       {func(t *testing.T, d string) { flip(t, filepath.Join(d, "meta"), 1100) }, "metadata image"},
		"bitmap":     {func(t *testing.T, d string) { flip(t, filepath.Join(d, "bitmap"), 20) }, "bitmap"},
		"record":     {func(t *testing.T, d string) { flip(t, filepath.Join(d, "bitmap"), 4096) }, "records"},
		"data short": {func(t *testing.T, d string) { _ = os.Truncate(filepath.Join(d, "data"), 70000) }, "do not match their digests"},
		"data gone":  {func(t *testing.T, d string) { _ = os.Remove(filepath.Join(d, "data")) }, "missing"},
		"half made": {func(t *testing.T, d string) {
			_ = os.MkdirAll(filepath.Join(d, "..", "..", "tmp", "7", "x"), 0o700)
		}, "left over"},
	} {
		t.Run(name, func(t *testing.T) {
			root, id := nodeRoot(t)
			clean(t, root)
			c.damage(t, filepath.Join(root, "diffs", id.Hex()))
			out, err := shoal(t, "check", "--root", root)
			if exitStatus(err) != exitDamaged || !strings.Contains(out, c.says) || !strings.Contains(out, "check --repair") {
				t.Fatalf("status %d, %v, says no %q:\n%s", exitStatus(err), err, c.says, out)
			}
			out, err = shoal(t, "check", "--root", root, "--repair", "--output", "json")
			var r control.CheckReport
			if jerr := json.Unmarshal([]byte(out), &r); jerr != nil || exitStatus(err) != exitRepaired || r.Result != control.Repaired ||
				len(r.Findings) == 0 || r.Findings[0].Repaired == "" {
				t.Fatalf("status %d, %v, %v:\n%s", exitStatus(err), err, jerr, out)
			}
			clean(t, root)
		})
	}
}

func TestCheckRefuses(t *testing.T) {
	root, _ := nodeRoot(t)
	c, err := cache.Open(t.Context(), cache.Config{Root: root, Source: &blockdevtest.Memory{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := shoal(t, "check", "--root", root); exitStatus(err) != 1 || !strings.Contains(err.Error(), "through the daemon") {
		t.Errorf("under a daemon: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := shoal(t, "check", "--root", t.TempDir()); exitStatus(err) != 1 || !strings.Contains(err.Error(), "neither the directory diffs") {
		t.Errorf("another directory: %v", err)
	}
	if _, err := shoal(t, "check", "--root", root, "--control", "/x"); exitStatus(err) != 1 {
		t.Errorf("both: %v", err)
	}
	if _, err := shoal(t, "check", "--root", root, "-o", "xml"); exitStatus(err) != 1 {
		t.Errorf("output xml: %v", err)
	}
	if _, err := shoal(t, "check", "--control", filepath.Join(root, "none")); exitStatus(err) != 1 || !errors.Is(err, control.ErrNoDaemon) {
		t.Errorf("no daemon: %v", err)
	}
}

// TestCheckDaemon: a running daemon is asked.
func TestCheckDaemon(t *testing.T) {
	d := &fakeDaemon{report: &control.CheckReport{Role: "node", Result: control.Clean, Layers: 2, Bytes: 5e6}, errs: map[string]error{}}
	socket := d.start(t)
	out, err := shoal(t, "check", "--control", socket)
	if err != nil || !strings.Contains(out, "node: 2 layers") || !strings.HasSuffix(out, "clean\n") || d.asked.Repair {
		t.Errorf("%v, %+v:\n%s", err, d.asked, out)
	}
	d.report = &control.CheckReport{Role: "node", Result: control.Damaged, Findings: []blockdev.Finding{{Where: "here", Problem: "broken"}, {Where: "there", Problem: "bent", Repaired: "straightened"}}}
	out, err = shoal(t, "check", "--repair", "--control", socket)
	if exitStatus(err) != exitDamaged || !d.asked.Repair || !strings.Contains(out, "broken   no") || !strings.Contains(out, "straightened") {
		t.Errorf("%v, %+v:\n%s", err, d.asked, out)
	}
	d.errs["check"] = errors.New("cannot read")
	if _, err = shoal(t, "check", "--control", socket); exitStatus(err) != 1 || !strings.Contains(err.Error(), "cannot read") {
		t.Errorf("%v", err)
	}
}

// TestCheckCancelled: a check that is cancelled has not said that all is well.
func TestCheckCancelled(t *testing.T) {
	root, _ := nodeRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := checkRoot(ctx, root, false, func(string) {}, slog.New(slog.DiscardHandler)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
