package registrytest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// Media types of what Push makes.
const (
	TypeManifest = "application/vnd.oci.image.manifest.v1+json"
	TypeIndex    = "application/vnd.oci.image.index.v1+json"
	TypeConfig   = "application/vnd.oci.image.config.v1+json"
	TypeGzip     = "application/vnd.oci.image.layer.v1.tar+gzip"
	TypeDocker   = "application/vnd.docker.distribution.manifest.v2+json"
)

// Layer is a layer's compressed bytes and what describes them.
type Layer struct {
	MediaType string
	Blob      []byte
	DiffID    blockdev.Digest
}

// Descriptor is an OCI descriptor.
type Descriptor struct {
	MediaType string          `json:"mediaType"`
	Digest    blockdev.Digest `json:"digest"`
	Size      int             `json:"size"`
	Platform  *Platform       `json:"platform,omitempty"`
}

// Platform is an OCI platform.
type Platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant,omitempty"`
}

// GzipLayer makes a layer with one file of size random bytes, the same for the
// same seed.
func GzipLayer(t testing.TB, name string, size int, seed uint64) Layer {
	t.Helper()
	var diff bytes.Buffer
	tw := tar.NewWriter(&diff)
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = r.Read(data) // never fails
	err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(size), Mode: 0o644})
	if err == nil {
		_, err = tw.Write(data)
	}
	if err == nil {
		err = tw.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return Compress(t, diff.Bytes())
}

// Compress makes a gzip layer of a tar stream.
func Compress(t testing.TB, diff []byte) Layer {
	t.Helper()
	var blob bytes.Buffer
	gz, err := gzip.NewWriterLevel(&blob, gzip.BestSpeed)
	if err == nil {
		_, err = gz.Write(diff)
	}
	if err == nil {
		err = gz.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return Layer{MediaType: TypeGzip, Blob: blob.Bytes(), DiffID: blockdev.Sum(diff)}
}

// Config returns an image config for the layers.
func Config(t testing.TB, p Platform, layers ...Layer) []byte {
	t.Helper()
	ids := []string{}
	for _, l := range layers {
		ids = append(ids, l.DiffID.String())
	}
	return JSON(t, map[string]any{"os": p.OS, "architecture": p.Architecture, "variant": p.Variant,
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids}})
}

// Manifest returns an image manifest.
func Manifest(t testing.TB, mediaType string, config []byte, layers ...Layer) []byte {
	t.Helper()
	ds := []Descriptor{}
	for _, l := range layers {
		ds = append(ds, Descriptor{MediaType: l.MediaType, Digest: blockdev.Sum(l.Blob), Size: len(l.Blob)})
	}
	ct := TypeConfig
	if mediaType == TypeDocker {
		ct = "application/vnd.docker.container.image.v1+json"
	}
	return JSON(t, map[string]any{"schemaVersion": 2, "mediaType": mediaType, "layers": ds,
		"config": Descriptor{MediaType: ct, Digest: blockdev.Sum(config), Size: len(config)}})
}

// JSON encodes v.
func JSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Target is a registry to push to.
type Target struct {
	// Host is "127.0.0.1:port"; it speaks plain HTTP.
	Host string
	// User and Password are for basic authentication; empty: none.
	User, Password string
}

func (r Target) do(t testing.TB, method, u, contentType string, body []byte) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, u, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if r.User != "" {
		req.SetBasicAuth(r.User, r.Password)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if cerr := resp.Body.Close(); err == nil {
		err = cerr
	}
	if err != nil || resp.StatusCode > 299 {
		t.Fatalf("%s %s: %s %s (%v)", method, u, resp.Status, b, err)
	}
	return resp
}

// PushBlob uploads a blob.
func (r Target) PushBlob(t testing.TB, repo string, blob []byte) blockdev.Digest {
	t.Helper()
	resp := r.do(t, http.MethodPost, fmt.Sprintf("http://%s/v2/%s/blobs/uploads/", r.Host, repo), "", nil)
	loc, err := resp.Location()
	if err != nil {
		t.Fatal(err)
	}
	d := blockdev.Sum(blob)
	q := loc.Query()
	q.Set("digest", d.String())
	loc.RawQuery = q.Encode()
	loc = resp.Request.URL.ResolveReference(&url.URL{Path: loc.Path, RawQuery: loc.RawQuery})
	r.do(t, http.MethodPut, loc.String(), "application/octet-stream", blob)
	return d
}

// PushManifest uploads a manifest or an image index under a tag.
func (r Target) PushManifest(t testing.TB, repo, tag, mediaType string, b []byte) blockdev.Digest {
	t.Helper()
	r.do(t, http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", r.Host, repo, tag), mediaType, b)
	return blockdev.Sum(b)
}

// Push uploads an image for linux/amd64 and returns its manifest's digest.
func (r Target) Push(t testing.TB, repo, tag string, layers ...Layer) blockdev.Digest {
	t.Helper()
	return r.PushAs(t, repo, tag, TypeManifest, Platform{OS: "linux", Architecture: "amd64"}, layers...)
}

// PushAs is Push with a choice of manifest type and platform.
func (r Target) PushAs(t testing.TB, repo, tag, mediaType string, p Platform, layers ...Layer) blockdev.Digest {
	t.Helper()
	for _, l := range layers {
		r.PushBlob(t, repo, l.Blob)
	}
	config := Config(t, p, layers...)
	r.PushBlob(t, repo, config)
	return r.PushManifest(t, repo, tag, mediaType, Manifest(t, mediaType, config, layers...))
}
