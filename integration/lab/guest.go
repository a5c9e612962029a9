package lab

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Guest is a layer with the program that the lab's pods run, as /guest
// (integration/guest), and the directories that a runtime mounts at. An image that
// begins with it needs nothing else.
func (l *Lab) Guest() (Blob, error) {
	program, err := os.ReadFile(filepath.Join(l.Bin, "guest"))
	if err != nil {
		return Blob{}, fmt.Errorf("%w: run `make setup`", err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	then := time.Unix(1_700_000_000, 0)
	for _, dir := range []string{"dev/", "etc/", "proc/", "sys/", "tmp/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: then}); err != nil {
			return Blob{}, err
		}
	}
	for _, f := range [][2]string{{"etc/passwd", "root:x:0:0:root:/:/guest\n"}, {"guest", string(program)}} {
		name, data := f[0], f[1]
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(data)), ModTime: then}); err != nil {
			return Blob{}, err
		}
		if _, err := w.Write([]byte(data)); err != nil {
			return Blob{}, err
		}
	}
	if err := w.Close(); err != nil {
		return Blob{}, err
	}
	return GzipLayer(b.Bytes())
}

// PushPause pushes the image that the sandboxes of pods run, and returns its
// reference.
func (r *Registry) PushPause(ctx context.Context) (string, error) {
	guest, err := r.lab.Guest()
	if err != nil {
		return "", err
	}
	_, err = r.Push(ctx, "pause", "v1", []string{"/guest", "pause"}, guest)
	return r.Addr + "/pause:v1", err
}
