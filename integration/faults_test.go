package integration

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestBadImages: an image that cannot be served lazily, for whatever is wrong
// with it, is left to containerd with a line in the log that names the image and
// the cause; nothing of it is published, and the next image is as lazy as ever.
func TestBadImages(t *testing.T) {
	s := newSite(t, "")
	good := layer(t, dir("bin/"), file("bin/true", bigContent(1)))
	terabytes := func() lab.Blob {
		raw := makeTar(t, file("f", "x"))
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "huge", Size: 5 << 40, Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		return must(lab.GzipLayer(append(b.Bytes(), raw...)))(t)
	}
	otherDiffID := layer(t, file("a", "a"))
	otherDiffID.DiffID = good.DiffID
	// Its DiffID is that of a layer nobody has: containerd asks for no chain that it has.
	notGzip := lab.NewBlob(lab.MediaTypeLayerGzip, []byte("this is no gzip stream at all"))
	notGzip.DiffID = layer(t, file("c", "c")).DiffID
	encrypted := layer(t, file("b", "b"))
	encrypted.MediaType = lab.MediaTypeLayerGzip + "+encrypted"
	cases := map[string]struct {
		layers []lab.Blob
		damage func(path string) error // spoils the first layer's blob in the registry's storage
		cause  []string                // each in the log line
	}{
		"truncated":    {[]lab.Blob{layer(t, file("t", bigContent(2))), good}, cutShort, []string{"layer"}},
		"absent":       {[]lab.Blob{layer(t, file("u", bigContent(3))), good}, os.Remove, []string{"layer"}},
		"wrong-diffid": {[]lab.Blob{good, otherDiffID}, nil, []string{"DiffID"}},
		"not-gzip":     {[]lab.Blob{notGzip}, nil, nil},
		"terabytes":    {[]lab.Blob{terabytes()}, nil, []string{"huge"}},
		"dotdot":       {[]lab.Blob{layer(t, file("a/../../b", "x"))}, nil, []string{"a/../../b"}},
		"encrypted":    {[]lab.Blob{encrypted}, nil, []string{"encrypted"}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			ref := s.push(t, name, c.layers...)
			if c.damage != nil {
				hex := strings.TrimPrefix(c.layers[0].Digest, "sha256:")
				blob := s.Path("images", "docker", "registry", "v2", "blobs", "sha256", hex[:2], hex, "data")
				if err := c.damage(blob); err != nil {
					t.Fatal(err)
				}
			}
			err := s.Pull(t.Context(), "shoal", ref)
			t.Logf("containerd: %v", err)
			line := logLine(t, s.node.Log, ref)
			if line == "" {
				t.Fatalf("the node's log does not name %s", ref)
			}
			for _, want := range c.cause {
				if !strings.Contains(line, want) {
					t.Errorf("the log line does not say %q: %s", want, line)
				}
			}
			if s.isLazy(t, t.Context(), ref) {
				t.Error("the image is listed as lazy")
			}
			fine := s.push(t, name+"-fine", layer(t, file(name, "fine")))
			if err := s.Pull(t.Context(), "shoal", fine); err != nil {
				t.Fatal(err)
			}
			if !s.isLazy(t, t.Context(), fine) {
				t.Error("the next image is not lazy")
			}
		})
	}
}

// cutShort leaves the first half of a file.
func cutShort(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return os.Truncate(path, info.Size()/2)
}

// logLine returns a warning in a log that names ref.
func logLine(t *testing.T, log, ref string) string {
	t.Helper()
	for _, line := range strings.Split(string(must(os.ReadFile(log))(t)), "\n") {
		if strings.Contains(line, ref) && (strings.Contains(line, "WARN") || strings.Contains(line, "ERROR")) {
			return line
		}
	}
	return ""
}

// TestDamagedFilesOnTheNode: what is damaged on disk while the node is down is
// found when it is read or opened, and fetched again; never handed out.
func TestDamagedFilesOnTheNode(t *testing.T) {
	for _, name := range []string{"index", "bitmap", "meta"} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "")
			ctx := t.Context()
			ref := s.push(t, "app", layer(t, dir("d/"), file("d/f", bigContent(1)), file("d/g", bigContent(2))))
			if err := s.Pull(ctx, "shoal", ref); err != nil {
				t.Fatal(err)
			}
			if err := s.node.Kill(); err != nil {
				t.Fatal(err)
			}
			files := must(filepath.Glob(filepath.Join(s.node.Root, "diffs", "*", name)))(t)
			if len(files) != 1 {
				t.Fatalf("%d files called %s, want 1", len(files), name)
			}
			b := must(os.ReadFile(files[0]))(t)
			for i := len(b) / 3; i < len(b)/3+16 && i < len(b); i++ {
				b[i] ^= 0xff
			}
			if err := os.WriteFile(files[0], b, 0o600); err != nil {
				t.Fatal(err)
			}
			s.node = must(s.RestartNode(ctx, s.node))(t)
			// Pulled again if it had to be dropped; read either way.
			if _, err := s.Ctr(ctx, "images", "rm", "--sync", ref); err != nil {
				t.Fatal(err)
			}
			if err := s.Pull(ctx, "shoal", ref); err != nil {
				t.Fatal(err)
			}
			view := s.mountImage(t, "shoal", ref)
			for i, f := range []string{"d/f", "d/g"} {
				if got := string(must(os.ReadFile(filepath.Join(view, f)))(t)); got != bigContent(i+1) {
					t.Errorf("%s has other content than was pushed", f)
				}
			}
		})
	}
}
