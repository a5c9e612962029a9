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
func (c imageFiles) compare(t *testing.T, dir string) {
	t.Helper()
	for path, want := range c {
		if got, err := os.ReadFile(filepath.Join(dir, path)); err != nil {
			t.Errorf("%s: %v", path, err)
		} else if string(got) != want {
			t.Errorf("%s: wrong bytes", path)
		}
	}
}

// check runs `shoal check` on a directory that nobody uses.
func shoalCheck(t *testing.T, l *lab.Lab, root string, args ...string) (string, error) {
	t.Helper()
	return l.Run(t.Context(), "shoal", append([]string{"check", "--root", root}, args...)...)
}

// TestPowerCutNode: the node's machine loses its power at random moments of pulls,
// reads and prefetch. Every byte that is read afterwards is right.
func TestPowerCutNode(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	registry := must(l.StartRegistry(ctx, "registry", l.Path("images"), ""))(t)
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	disk := must(l.NewDisk(ctx, "node", 512<<20))(t)
	node := must(l.StartNode(ctx, "node", super.Address, ""))(t)
	var images []*lab.Image
	var wants []imageFiles
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 5 {
		im, want := pushContent(t, registry, fmt.Sprintf("app%d", round), uint64(round))
		images, wants = append(images, im), append(wants, want)
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
					t.Errorf("round %d: %s: wrong bytes", round, path)
				}
			}
			_ = unmount() // the node may be gone
		})
		time.Sleep(time.Duration(50+rng.IntN(1500)) * time.Millisecond) // the moment is the point of it
		if err := disk.Cut(); err != nil {
			t.Fatal(err)
		}
		stop()
		if err := node.Kill(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		detachBelow(t, l.Path(fmt.Sprintf("view%d", round)))
		if err := disk.Restore(ctx); err != nil {
			t.Fatal(err)
		}
		node = must(l.RestartNode(ctx, node))(t)
		for i, im := range images {
			if err := node.Pull(ctx, im); err != nil {
				t.Fatalf("round %d, image %d: %v", round, i, err)
			}
			dir := l.Path("all")
			unmount := must(node.Mount(ctx, im, fmt.Sprintf("all%d-%d", round, i), dir))(t)
			wants[i].compare(t, dir)
			if err := unmount(); err != nil {
				t.Error(err)
			}
		}
	}
	if err := node.Stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := shoalCheck(t, l, node.Root); err != nil {
		t.Errorf("after all of it: %v\n%s", err, out)
	}
}

// detachBelow unmounts what an interrupted reader has left.
func detachBelow(t *testing.T, dir string) {
	t.Helper()
	if err := lab.DetachAll(dir); err != nil {
		t.Fatal(err)
	}
}

// TestPowerCutSupernode: the same for the supernode, while it ingests, compresses
// and serves. It keeps its identity, and what it hands out is right.
func TestPowerCutSupernode(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	registry := must(l.StartRegistry(ctx, "registry", l.Path("images"), ""))(t)
	disk := must(l.NewDisk(ctx, "super", 1<<30))(t)
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	address := super.Address
	node := must(l.StartNode(ctx, "node", address, ""))(t)
	rng := rand.New(rand.NewPCG(5, 6))
	for round := range 4 {
		im, want := pushContent(t, registry, fmt.Sprintf("app%d", round), 100+uint64(round))
		pulled := make(chan error, 1)
		go func() { pulled <- node.Pull(ctx, im) }()
		time.Sleep(time.Duration(20+rng.IntN(1200)) * time.Millisecond) // the moment is the point of it
		if err := disk.Cut(); err != nil {
			t.Fatal(err)
		}
		if err := super.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := disk.Restore(ctx); err != nil {
			t.Fatal(err)
		}
		super = must(l.RestartSupernode(ctx, super))(t)
		if super.Address != address {
			t.Fatalf("round %d: the supernode was %s and is %s", round, address, super.Address)
		}
		<-pulled // whatever came of it
		err := lab.WaitFor(ctx, "the pull after the power cut", time.Minute, func() error { return node.Pull(ctx, im) })
		if err != nil {
			t.Fatal(err)
		}
		dir := l.Path("all")
		unmount := must(node.Mount(ctx, im, fmt.Sprintf("all%d", round), dir))(t)
		want.compare(t, dir)
		if err := unmount(); err != nil {
			t.Error(err)
		}
	}
	out, err := l.Run(ctx, "shoal", "check", "--control", super.Control)
	if err != nil {
		t.Errorf("running: %v\n%s", err, out)
	}
	if err := super.Stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := shoalCheck(t, l, l.Path("super")); err != nil {
		t.Errorf("stopped: %v\n%s", err, out)
	}
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
	if n := bytes.Count(must(os.ReadFile(s.node.Log))(t), []byte("it is quarantined")); n != 1 {
		t.Errorf("%d lines in the log, want 1", n)
	}
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
