package main

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const (
	imageFile       = "shoal-image.tar"
	imageRepository = "ghcr.io/shoalfs/shoal"
)

// writeImage writes an image for each platform and the index of all, as an OCI
// layout in a tar: `ctr images import` and `skopeo copy --all oci-archive:...` take it.
func writeImage(name string, src *source, programs []built) error {
	notes := annotations(src)
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, b := range programs {
		img, err := newImage(src, b)
		if err != nil {
			return fmt.Errorf("image for %s: %w", b, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: b.OS, Architecture: b.Arch}},
		})
	}
	index, ok := mutate.Annotations(index, notes).(v1.ImageIndex)
	if !ok {
		return fmt.Errorf("index with annotations: it is a %T", index)
	}
	dir, err := os.MkdirTemp("", "shoal-image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	at, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	// The first is the specification's, a tag; the second is the full name, which
	// containerd gives the image at an import.
	if err := at.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": src.Version,
		"io.containerd.image.name":          imageRepository + ":" + src.Version,
	})); err != nil {
		return err
	}
	return writeFile(name, func(w io.Writer) error {
		var entries []entry
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || path == dir {
				return err
			}
			name, err := filepath.Rel(dir, path)
			if d.IsDir() {
				entries = append(entries, entry{Name: name + "/", Mode: 0o755})
			} else {
				entries = append(entries, entry{Name: name, Mode: 0o644, From: path})
			}
			return err
		})
		if err != nil {
			return err
		}
		return writeTar(w, src.Time, entries)
	})
}

// annotations are the image specification's own: on the index, on each manifest,
// and, as labels, in each config.
func annotations(src *source) map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":         "shoal",
		"org.opencontainers.image.description":   description,
		"org.opencontainers.image.created":       src.Time.Format(time.RFC3339),
		"org.opencontainers.image.version":       src.Version,
		"org.opencontainers.image.revision":      src.Revision,
		"org.opencontainers.image.source":        projectURL,
		"org.opencontainers.image.documentation": projectURL + "/tree/main/docs",
		"org.opencontainers.image.licenses":      license,
	}
}

// newImage makes the image for one platform: the programs and root certificates,
// with no base image, no shell and no libraries.
func newImage(src *source, b built) (v1.Image, error) {
	var packed bytes.Buffer
	if err := writeTarGz(&packed, src.Time, rootFS(b)); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(packed.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.Append(img, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: src.Time}, CreatedBy: "shoal " + src.Version},
	}); err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = b.OS, b.Arch
	config.Created = v1.Time{Time: src.Time}
	config.Config = v1.Config{
		Entrypoint: []string{"/usr/local/bin/shoal"},
		Env:        []string{"PATH=/usr/local/bin"},
		WorkingDir: "/",
		Labels:     annotations(src),
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return nil, err
	}
	noted, ok := mutate.Annotations(img, annotations(src)).(v1.Image)
	if !ok {
		return nil, fmt.Errorf("image with annotations: it is a %T", noted)
	}
	return noted, nil
}

// rootFS is all that is in the image.
func rootFS(b built) []entry {
	files := []entry{
		{Name: "etc/", Mode: 0o755},
		{Name: "etc/shoal/", Mode: 0o755},
		{Name: "etc/ssl/", Mode: 0o755},
		// Go reads this file and then each other file of the directory: an operator's
		// own certificate is mounted beside it.
		{Name: "etc/ssl/certs/", Mode: 0o755},
		{Name: "etc/ssl/certs/ca-certificates.crt", Mode: 0o644, Data: rootCertificates()},
		{Name: "run/", Mode: 0o755},
		{Name: "tmp/", Mode: 0o1777},
		{Name: "usr/", Mode: 0o755},
		{Name: "usr/local/", Mode: 0o755},
		{Name: "usr/local/bin/", Mode: 0o755},
	}
	for _, p := range b.Programs {
		files = append(files, entry{Name: "usr/local/bin/" + p.Name, Mode: 0o755, From: p.File})
	}
	files = append(files,
		entry{Name: "usr/share/", Mode: 0o755},
		entry{Name: "usr/share/doc/", Mode: 0o755},
		entry{Name: "usr/share/doc/shoal/", Mode: 0o755},
	)
	for _, f := range b.ImageLegal {
		f.Name = "usr/" + f.Name
		files = append(files, f)
	}
	return append(files, entry{Name: "var/", Mode: 0o755}, entry{Name: "var/lib/", Mode: 0o755})
}

// rootCertificatesFrom is the package that rootCertificates reads.
var rootCertificatesFrom = goPackage{"deploy/release", "golang.org/x/crypto/x509roots/fallback/bundle"}

// rootCertificates are those that Mozilla trusts, as the Go project publishes them,
// in PEM. A root that is trusted only for certificates issued before some day is
// left out: a file of certificates cannot say so.
func rootCertificates() []byte {
	var all bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			all.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}))
		}
	}
	return all.Bytes()
}
