package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// checkELF: a program is for its platform, and needs no library and no loader.
func checkELF(t *testing.T, r io.ReaderAt, p platform) {
	t.Helper()
	f, err := elf.NewFile(r)
	noError(t, err)
	if f.Machine != machines[p.Arch] || f.Class != elf.ELFCLASS64 {
		t.Errorf("%s: the program is for %v, %v", p, f.Machine, f.Class)
	}
	for _, s := range f.Progs {
		if s.Type == elf.PT_INTERP || s.Type == elf.PT_DYNAMIC {
			t.Errorf("%s: the program has a %v", p, s.Type)
		}
	}
}

// TestStatic: the programs of a release are static.
func TestStatic(t *testing.T) {
	_, programs := buildHere(t, work)
	for _, p := range programs[0].Programs {
		f, err := os.Open(p.File)
		noError(t, err)
		checkELF(t, f, programs[0].platform)
		noError(t, f.Close())
	}
}

// TestImage: the index has an image for each platform, and each image has the program
// for its platform. The programs are small ones, because those of shoal take minutes
// for an architecture that is not the machine's.
func TestImage(t *testing.T) {
	src, err := readSource(t.Context(), "v1.2.3")
	noError(t, err)
	small := &source{Root: t.TempDir(), Version: src.Version}
	noError(t, os.WriteFile(small.in("go.mod"), []byte("module example.test/small\n\ngo 1.26\n"), 0o644))
	noError(t, os.WriteFile(small.in("main.go"), []byte("package main\n\nfunc main() {}\n"), 0o644))
	var programs []built
	for _, arch := range []string{"amd64", "arm64"} {
		b := built{platform: platform{"linux", arch}, ImageLegal: []entry{{Name: "share/doc/shoal/LICENSE", Mode: 0o644, Data: []byte("text of " + arch)}}}
		b.Programs = []program{{Name: "shoal", File: filepath.Join(t.TempDir(), "shoal"), goPackage: goPackage{".", "."}}}
		noError(t, buildProgram(t.Context(), small, b.platform, b.Programs[0]))
		programs = append(programs, b)
	}
	name, dir := filepath.Join(t.TempDir(), imageFile), t.TempDir()
	noError(t, writeImage(name, src, programs))
	if out, err := exec.CommandContext(t.Context(), "tar", "-C", dir, "-xf", name).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	path, err := layout.FromPath(dir)
	noError(t, err)
	top, err := path.ImageIndex()
	noError(t, err)
	noError(t, validate.Index(top))
	list, err := top.IndexManifest()
	noError(t, err)
	if len(list.Manifests) != 1 || list.Manifests[0].Annotations["io.containerd.image.name"] != "ghcr.io/shoalfs/shoal:v1.2.3" {
		t.Fatalf("the layout has %+v", list.Manifests)
	}
	index, err := top.ImageIndex(list.Manifests[0].Digest)
	noError(t, err)
	if list, err = index.IndexManifest(); err != nil || list.MediaType != types.OCIImageIndex || len(list.Manifests) != len(programs) {
		t.Fatalf("the index is %+v, %v", list, err)
	}
	for i, b := range programs {
		d := list.Manifests[i]
		if d.MediaType != types.OCIManifestSchema1 || d.Platform == nil || d.Platform.String() != b.String() {
			t.Errorf("%s: the descriptor is %+v, of %v", b, d, d.Platform)
		}
		img, err := index.Image(d.Digest)
		noError(t, err)
		config, err := img.ConfigFile()
		noError(t, err)
		if config.OS != b.OS || config.Architecture != b.Arch {
			t.Errorf("%s: the config says %s/%s", b, config.OS, config.Architecture)
		}
		files := imageFiles(t, img)
		checkELF(t, bytes.NewReader(files["usr/local/bin/shoal"]), b.platform)
		if got := string(files["usr/share/doc/shoal/LICENSE"]); got != "text of "+b.Arch {
			t.Errorf("%s: the license is %q", b, got)
		}
	}
}

// imageFiles returns the files of an image, which have to be in folders that are there.
func imageFiles(t *testing.T, img v1.Image) map[string][]byte {
	t.Helper()
	layers, err := img.Layers()
	noError(t, err)
	if len(layers) != 1 {
		t.Fatalf("the image has %d layers", len(layers))
	}
	r, err := layers[0].Uncompressed()
	noError(t, err)
	defer r.Close()
	files, folders := map[string][]byte{}, map[string]bool{".": true}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		noError(t, err)
		if h.Uid != 0 || h.Gid != 0 || !folders[filepath.Dir(filepath.Clean(h.Name))] {
			t.Errorf("%s: owner %d:%d, or its folder is missing", h.Name, h.Uid, h.Gid)
		}
		if h.Typeflag == tar.TypeDir {
			folders[filepath.Clean(h.Name)] = true
			continue
		}
		files[h.Name], err = io.ReadAll(tr)
		noError(t, err)
	}
}
