package integration

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// sparseSize is the length of the large file with nearly nothing in it.
const sparseSize = 20 << 30

// sparseLayer is a layer with one sparse file, made by GNU tar.
func sparseLayer(t *testing.T) lab.Blob {
	t.Helper()
	base := t.TempDir()
	f := must(os.Create(filepath.Join(base, "sparse")))(t)
	if err := f.Truncate(sparseSize); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 7 << 30, sparseSize - 4096} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte(off>>30) + 1}, 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	b, err := exec.Command("tar", "--sparse", "--format=posix", "-C", base, "-cf", "-", "sparse").Output()
	if err != nil {
		t.Fatalf("tar: %v", err)
	}
	return must(lab.GzipLayer(b))(t)
}

// manyFiles is a layer with n files in one directory.
func manyFiles(t *testing.T, n int) lab.Blob {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "many/", Mode: 0o755})
	for i := 0; i < n && err == nil; i++ {
		data := fmt.Sprint("file ", i)
		if err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("many/%06d", i), Mode: 0o644, Size: int64(len(data))}); err == nil {
			_, err = io.WriteString(w, data)
		}
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return must(lab.GzipLayer(b.Bytes()))(t)
}

// TestDrillSizes: 127 layers in one image, 100,000 files in one directory, a sparse
// file of 20 GiB, more than 100 mounts at a time; all of it proven, within 256 MiB
// and a MiB for each mount.
func TestDrillSizes(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	d := &tally{drill: "127 layers, 100,000 files in a directory, 20 GiB sparse file", rounds: 1}
	registry := must(l.StartRegistry(ctx, "registry", l.Path("images"), ""))(t)
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	node := must(l.StartNode(ctx, "node", super.Address, ""))(t)

	const files = 100_000
	layers := []lab.Blob{manyFiles(t, files), sparseLayer(t)}
	for len(layers) < 127 {
		i := len(layers)
		layers = append(layers, layer(t, file(fmt.Sprintf("layer%d", i), fmt.Sprint("content ", i))))
	}
	must(registry.Push(ctx, "large", "v1", []string{"/bin/true"}, layers...))(t)
	im := must(registry.Image(ctx, "large", "v1"))(t)
	noError(t, node.Pull(ctx, im))
	dir := l.Path("view")
	unmount := must(node.Mount(ctx, im, "view", dir))(t)
	if n := len(must(os.ReadDir(filepath.Join(dir, "many")))(t)); n != files {
		t.Errorf("%d files in one directory, want %d", n, files)
	}
	for i := 0; i < files; i += 101 {
		d.file(filepath.Join(dir, "many", fmt.Sprintf("%06d", i)), fmt.Sprint("file ", i))
	}
	for i := 2; i < len(layers); i++ {
		d.file(filepath.Join(dir, fmt.Sprintf("layer%d", i)), fmt.Sprint("content ", i))
	}
	f := must(os.Open(filepath.Join(dir, "sparse")))(t)
	if st := must(f.Stat())(t); st.Size() != sparseSize {
		t.Errorf("the sparse file has %d bytes", st.Size())
	}
	for off, want := range map[int64]byte{0: 1, 100 << 20: 0, 7 << 30: 8, 15<<30 + 123: 0, sparseSize - 1: byte((sparseSize-4096)>>30) + 1} {
		b := []byte{0xff}
		_, err := f.ReadAt(b, off)
		if err == nil && b[0] != want {
			err = fmt.Errorf("the sparse file at %d has %d, want %d: %w", off, b[0], want, lab.ErrWrong)
		}
		d.add(1, err)
	}
	f.Close()
	d.add(0, lab.WaitFor(ctx, "all layers proven", 3*time.Minute, func() error {
		n, err := node.Metric(ctx, "shoal_node_proven_diffs")
		if err == nil && int(n) < len(layers) {
			_, _ = l.Run(ctx, "shoal", "prefetch", "--local", "--control", node.Control, im.Ref)
			err = fmt.Errorf("%.0f of %d", n, len(layers))
		}
		return err
	}))
	mounts := len(must(l.Mounts())(t))
	if mounts < len(layers) {
		t.Errorf("%d mounts, want one for each of %d layers", mounts, len(layers))
	}
	_, peak, err := node.RSS()
	noError(t, err)
	noError(t, unmount())
	d.rows(t)
	figure(t, d.drill+": mounts", "", report.AtLeast, 100, float64(mounts))
	most := float64(256 + mounts)
	figure(t, d.drill+": peak RSS of the node (256 MiB and one for each mount)", "MiB", report.AtMost, most, float64(peak)/(1<<20))
	if float64(peak)/(1<<20) > most && !isDrill() {
		t.Errorf("RSS was %d MiB, at most %.0f MiB are allowed", peak>>20, most)
	}
}
