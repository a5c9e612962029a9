package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/internal/control"
)

// bin is where `make build` and `make setup` put the programs.
func bin(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts file systems and runs containers: run as root")
	}
	dir := os.Getenv("SHOAL_BIN")
	if dir == "" {
		dir = "../bin"
	}
	if _, err := os.Stat(filepath.Join(dir, "shoal")); err != nil {
		t.Fatalf("%v: run `make setup build` first, or name the directory in SHOAL_BIN", err)
	}
	return dir
}

// newLab makes a lab that ends with the test, and says so if anything is left.
func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	l, err := lab.New(bin(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := filepath.Glob(l.Path("log", "*.log"))
			for _, f := range logs {
				t.Logf("%s ends:\n%s", filepath.Base(f), lab.Tail(f, 10))
			}
		}
		if err := l.Close(); err != nil {
			t.Errorf("close the lab: %v", err)
		}
	})
	return l
}

// realRegistry serves the real images, of which those named are built if they are
// not there.
func realRegistry(t *testing.T, l *lab.Lab, names ...string) *lab.Registry {
	t.Helper()
	build := exec.CommandContext(t.Context(), "../bench/images/build.sh", names...)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the images: %v\n%s", err, out)
	}
	images := must(lab.ImagesDir())(t)
	return must(l.StartRegistry(t.Context(), "registry-of-real-images", filepath.Join(images, "registry"), ""))(t)
}

// site is the usual set-up: a registry of our own, a supernode, and a machine
// with a node and a containerd.
type site struct {
	*lab.Lab
	registry  *lab.Registry
	supernode *lab.Supernode
	node      *lab.Node
	// containers counts those that sh has run.
	containers int
	*lab.Containerd
}

func newSite(t *testing.T, nodeConfig string) *site {
	t.Helper()
	s := &site{Lab: newLab(t)}
	s.registry = must(s.StartRegistry(t.Context(), "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", ""))(t)
	s.node = must(s.StartNode(t.Context(), "node", s.supernode.Address, nodeConfig))(t)
	s.Containerd = must(s.StartContainerd(t.Context(), "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket, ShoalRoot: s.node.Root}))(t)
	return s
}

// Path and Close are the lab's; Process is in several of the embedded.
func (s *site) Path(elem ...string) string { return s.Lab.Path(elem...) }

// push pushes an image of these layers and returns its reference.
func (s *site) push(t *testing.T, repository string, layers ...lab.Blob) string {
	t.Helper()
	if _, err := s.registry.Push(t.Context(), repository, "v1", []string{"/bin/true"}, layers...); err != nil {
		t.Fatal(err)
	}
	return s.registry.Addr + "/" + repository + ":v1"
}

// must fails the test on an error: must(f())(t).
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// mountImage mounts an image that was pulled and returns where; it is unmounted
// at the test's end.
func (s *site) mountImage(t *testing.T, snapshotter, ref string) string {
	t.Helper()
	dir := must(os.MkdirTemp(s.Dir, "view"))(t)
	unmount := must(s.MountImage(t.Context(), snapshotter, ref, dir))(t)
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// entry is one entry of a tar that a test makes.
type entry struct {
	tar.Header
	data string
}

var mtime = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)

func dir(name string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: mtime}}
}

func file(name, data string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: mtime, Size: int64(len(data))}, data}
}

func link(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, ModTime: mtime}}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: mtime}}
}

// with changes an entry's header.
func (e entry) with(change func(*tar.Header)) entry {
	change(&e.Header)
	return e
}

// makeTar makes a tar of entries.
func makeTar(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Format == tar.FormatUnknown && (h.PAXRecords != nil || h.ModTime.Nanosecond() != 0) {
			h.Format = tar.FormatPAX
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
		if _, err := w.Write([]byte(e.data)); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// layer makes a gzip layer of entries.
func layer(t *testing.T, entries ...entry) lab.Blob {
	t.Helper()
	return must(lab.GzipLayer(makeTar(t, entries...)))(t)
}

// isLazy says whether the node has ref as a lazy image.
func (s *site) isLazy(t *testing.T, ctx context.Context, ref string) bool {
	t.Helper()
	for _, im := range must(s.node.Status(ctx))(t).Images {
		if im.Ref == ref {
			return true
		}
	}
	return false
}

// state is how the site's node does.
func (s *site) state(t *testing.T) *control.State {
	t.Helper()
	return must(control.Client{Path: s.node.Control}.State(t.Context(), 0))(t)
}

// notice returns the newest notice of this kind about an image.
func notice(t *testing.T, st *control.State, what control.What, ref string) control.Notice {
	t.Helper()
	for _, n := range slices.Backward(st.Notices) {
		if n.What == what && slices.Contains(n.Refs, ref) {
			return n
		}
	}
	t.Errorf("no notice %s about %s: %+v", what, ref, st.Notices)
	return control.Notice{}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
