package integration

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// toolsLayer is a layer of this machine's programs and their libraries, at the
// places where they are here, so that tests can look at an image from inside a
// container with the tools that people use.
func toolsLayer(t *testing.T, programs ...string) lab.Blob {
	t.Helper()
	files := map[string]string{} // name in the image -> path here
	for _, p := range programs {
		path := must(exec.LookPath(p))(t)
		files["bin/"+p] = path
		for line := range strings.Lines(string(must(exec.CommandContext(t.Context(), "ldd", path).Output())(t))) {
			for _, f := range strings.Fields(line) {
				if strings.HasPrefix(f, "/") {
					files[strings.TrimPrefix(f, "/")] = f
				}
			}
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	dirs := map[string]bool{}
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for _, p := range parents(name) {
			if !dirs[p] {
				dirs[p] = true
				noError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: p + "/", Mode: 0o755, ModTime: mtime}))
			}
		}
		data := must(os.ReadFile(files[name]))(t)
		noError(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(data)), ModTime: mtime}))
		_, err := w.Write(data)
		noError(t, err)
	}
	noError(t, w.Close())
	return must(lab.GzipLayer(b.Bytes()))(t)
}

// parents lists the directories above a name, the topmost first.
func parents(name string) (dirs []string) {
	for d := filepath.Dir(name); d != "."; d = filepath.Dir(d) {
		dirs = append(dirs, d)
	}
	slices.Reverse(dirs)
	return dirs
}

// sh runs a script in a container of ref and returns what it prints.
func (s *site) sh(t *testing.T, snapshotter, ref, script string, flags ...string) (string, error) {
	t.Helper()
	s.containers++
	id := fmt.Sprintf("%s-sh-%d", filepath.Base(s.Dir), s.containers)
	args := append([]string{"run", "--rm", "--snapshotter", snapshotter}, flags...)
	return s.Ctr(t.Context(), append(args, ref, id, "/bin/sh", "-c", script)...)
}

// copied is how many bytes of files lie in the node's ordinary snapshots.
func (s *site) copied(t *testing.T) (n int64) {
	t.Helper()
	noError(t, filepath.WalkDir(filepath.Join(s.node.Root, "s"), func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() == "i" && filepath.Dir(filepath.Dir(p)) == filepath.Join(s.node.Root, "s") {
			return filepath.SkipDir // clones of what lies elsewhere
		}
		fi, err := d.Info()
		if err == nil && fi.Mode().IsRegular() {
			n += fi.Size()
		}
		return err
	}))
	return n
}
