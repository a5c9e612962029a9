package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/internal/control"
)

// imageFiles are files of an image that tests read back: content by path.
type imageFiles map[string]string

// pushContent pushes an image of two layers with random files.
func pushContent(t *testing.T, r *lab.Registry, name string, seed uint64) (*lab.Image, imageFiles) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 7))
	want := imageFiles{}
	var layers []lab.Blob
	for l := range 2 {
		var entries []entry
		for f := range 12 {
			b := make([]byte, rng.IntN(900<<10))
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			path := fmt.Sprintf("l%d-f%d", l, f)
			want[path] = string(b)
			entries = append(entries, file(path, string(b)))
		}
		layers = append(layers, layer(t, entries...))
	}
	if _, err := r.Push(t.Context(), name, "v1", []string{"/bin/true"}, layers...); err != nil {
		t.Fatal(err)
	}
	return must(r.Image(t.Context(), name, "v1"))(t), want
}

// compare reads all files below dir.
func (c imageFiles) compare(d *tally, dir string) {
	for path, want := range c {
		d.file(filepath.Join(dir, path), want)
	}
}

// check runs `shoal check` on a directory that nobody uses.
func shoalCheck(t *testing.T, l *lab.Lab, root string, args ...string) (string, error) {
	t.Helper()
	return l.Run(t.Context(), "shoal", append([]string{"check", "--root", root}, args...)...)
}

// TestDrillPowerCutNode: the node's machine loses its power at random moments of
// pulls, reads and prefetch. Every byte that is read afterwards is right.
func TestDrillPowerCutNode(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	d := &tally{drill: "power cut of the node's machine", rounds: min(rounds(t, 5), 30)}
	registry := must(l.StartRegistry(ctx, "registry", l.Path("images"), ""))(t)
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	disk := must(l.NewDisk(ctx, "node", 2<<30))(t)
	node := must(l.StartNode(ctx, "node", super.Address, ""))(t)
	type pulled struct {
		*lab.Image
		want imageFiles
	}
	var images []pulled // the newest few, which are read after each cut
	for round := range d.rounds {
		im, want := pushContent(t, registry, fmt.Sprintf("app%d", round), uint64(round))
		images = append(images, pulled{im, want})
		images = images[max(0, len(images)-5):]
		reading, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := node.Pull(reading, im); err != nil {
				return // the power went first
			}
			dir := l.Path(fmt.Sprintf("view%d", round))
			unmount, err := node.Mount(reading, im, fmt.Sprintf("view%d", round), dir)
			if err != nil {
				return
			}
			for path, w := range want {
				// An error is what a machine without power may give; wrong bytes are not.
				if got, err := os.ReadFile(filepath.Join(dir, path)); err == nil && string(got) != w && reading.Err() == nil {
					d.add(1, fmt.Errorf("round %d: %s: %w", round, path, lab.ErrWrong))
				}
			}
			_ = unmount() // the node may be gone
		})
		wait(ctx, 50*time.Millisecond+rand.N(1500*time.Millisecond))
		noError(t, disk.Cut())
		stop()
		noError(t, node.Kill())
		wg.Wait()
		detachBelow(t, l.Path(fmt.Sprintf("view%d", round)))
		noError(t, disk.Restore(ctx))
		node = must(l.RestartNode(ctx, node))(t)
		for i, im := range images {
			if err := node.Pull(ctx, im.Image); err != nil {
				t.Fatalf("round %d, image %d: %v", round, i, err)
			}
			dir := l.Path("all")
			unmount := must(node.Mount(ctx, im.Image, fmt.Sprintf("all%d-%d", round, i), dir))(t)
			im.want.compare(d, dir)
			noError(t, unmount())
		}
	}
	noError(t, node.Stop())
	if out, err := shoalCheck(t, l, node.Root); err != nil {
		t.Errorf("after all of it: %v\n%s", err, out)
	}
	d.rows(t)
}

// detachBelow unmounts what an interrupted reader has left.
func detachBelow(t *testing.T, dir string) {
	t.Helper()
	if err := lab.DetachAll(dir); err != nil {
		t.Fatal(err)
	}
}

// TestDrillPowerCutSupernode: the same for the supernode, while it ingests,
// compresses and serves. It keeps its identity, and what it hands out is right.
func TestDrillPowerCutSupernode(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	d := &tally{drill: "power cut of the supernode's machine", rounds: min(rounds(t, 4), 30)}
	registry := must(l.StartRegistry(ctx, "registry", l.Path("images"), ""))(t)
	disk := must(l.NewDisk(ctx, "super", 2<<30))(t)
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	node := must(l.StartNode(ctx, "node", super.Address, ""))(t)
	for round := range d.rounds {
		im, want := pushContent(t, registry, fmt.Sprintf("app%d", round), 100+uint64(round))
		pulled := make(chan error, 1)
		go func() { pulled <- node.Pull(ctx, im) }()
		wait(ctx, 20*time.Millisecond+rand.N(1200*time.Millisecond))
		noError(t, disk.Cut())
		noError(t, super.Kill())
		noError(t, disk.Restore(ctx))
		super = must(l.RestartSupernode(ctx, super))(t)
		<-pulled // whatever came of it
		// The node names the identity of the supernode that it talks to.
		noError(t, lab.WaitFor(ctx, "the pull after the power cut", time.Minute, func() error { return node.Pull(ctx, im) }))
		dir := l.Path("all")
		unmount := must(node.Mount(ctx, im, fmt.Sprintf("all%d", round), dir))(t)
		want.compare(d, dir)
		noError(t, unmount())
		noError(t, node.RemoveImage(ctx, im))
	}
	out, err := l.Run(ctx, "shoal", "check", "--control", super.Control)
	if err != nil {
		t.Errorf("running: %v\n%s", err, out)
	}
	noError(t, super.Stop())
	if out, err := shoalCheck(t, l, l.Path("super")); err != nil {
		t.Errorf("stopped: %v\n%s", err, out)
	}
	d.rows(t)
}

// TestQuarantine: a node whose index is not that of its layer finds out when it has
// all bytes, and starts nothing new on it; the operator's way on works.
func TestQuarantine(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, dir("d/"), file("d/f", bigContent(1)), file("d/g", bigContent(2))))
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	if err := s.node.Stop(); err != nil {
		t.Fatal(err)
	}
	files := must(filepath.Glob(filepath.Join(s.node.Root, "diffs", "*", "index")))(t)
	if len(files) != 1 {
		t.Fatalf("%d indexes, want 1", len(files))
	}
	lie(t, files[0])
	s.node = must(s.RestartNode(ctx, s.node))(t)
	out, err := s.Lab.Run(ctx, "shoal", "prefetch", "--local", "--control", s.node.Control, ref)
	if err == nil || !strings.Contains(err.Error(), "quarantined") {
		t.Fatalf("prefetch --local: %v\n%s", err, out)
	}
	view := must(os.MkdirTemp(s.Dir, "view"))(t)
	if _, err := s.MountImage(ctx, "shoal", ref, view); err == nil || !strings.Contains(err.Error(), "quarantined") || !strings.Contains(err.Error(), "To go on") {
		t.Errorf("a new container: %v", err)
	}
	if n := bytes.Count(must(os.ReadFile(s.node.Log))(t), []byte("the index is quarantined")); n != 1 {
		t.Errorf("%d lines in the log, want 1", n)
	}
	notice(t, s.state(t), control.Quarantined, ref)
	if n := must(s.node.Metric(ctx, "shoal_node_quarantined_diffs"))(t); n != 1 {
		t.Errorf("shoal_node_quarantined_diffs is %v", n)
	}
	if out, err := s.Lab.Run(ctx, "shoal", "status", "--control", s.node.Control); err != nil || !strings.Contains(out, "QUARANTINED") {
		t.Errorf("status: %v\n%s", err, out)
	}
	// Removed and pulled again, with the index that the supernode really has.
	if _, err := s.Ctr(ctx, "images", "rm", "--sync", ref); err != nil {
		t.Fatal(err)
	}
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	if out, err := s.Lab.Run(ctx, "shoal", "prefetch", "--local", "--control", s.node.Control, ref); err != nil {
		t.Errorf("prefetch --local: %v\n%s", err, out)
	}
	dir := s.mountImage(t, "shoal", ref)
	if b, err := os.ReadFile(filepath.Join(dir, "d", "f")); err != nil || string(b) != bigContent(1) {
		t.Errorf("d/f: %v, or wrong bytes", err)
	}
	if out, err := s.Lab.Run(ctx, "shoal", "status", "--control", s.node.Control); err != nil || !strings.Contains(out, "yes") {
		t.Errorf("status: %v\n%s", err, out)
	}
}

// lie changes a byte of the metadata image in an index (docs/formats.md, "Index"),
// with a checksum that fits, as if the supernode had made it so: its last,
// which is behind all that is looked at.
func lie(t *testing.T, path string) {
	t.Helper()
	b := must(os.ReadFile(path))(t)
	le := binary.LittleEndian
	end := 112 + int(le.Uint32(b[40:]))
	dec := must(zstd.NewReader(nil))(t)
	defer dec.Close()
	body := must(dec.DecodeAll(b[112:end], nil))(t)
	body[le.Uint32(b[28:])-1] ^= 1
	enc := must(zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true)))(t)
	defer enc.Close()
	out := enc.EncodeAll(body, bytes.Clone(b[:112]))
	le.PutUint32(out[40:], uint32(len(out)-112))
	out = append(out, b[end:]...)
	sum := sha256.New()
	for _, part := range [][]byte{out[:40], out[44:80], body, b[end:]} {
		sum.Write(part)
	}
	copy(out[80:112], sum.Sum(nil))
	if err := os.WriteFile(path, out, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bitmap", "proof"} { // they name the index they belong to
		if err := os.RemoveAll(filepath.Join(filepath.Dir(path), name)); err != nil {
			t.Fatal(err)
		}
	}
}
