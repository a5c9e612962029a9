package lab

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// Blob is content with its digest.
type Blob struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`

	Data []byte `json:"-"`
	// DiffID is a layer's digest before compression.
	DiffID string `json:"-"`
}

// Media types of the images that Push makes.
const (
	MediaTypeManifest  = "application/vnd.oci.image.manifest.v1+json"
	MediaTypeIndex     = "application/vnd.oci.image.index.v1+json"
	MediaTypeConfig    = "application/vnd.oci.image.config.v1+json"
	MediaTypeLayer     = "application/vnd.oci.image.layer.v1.tar"
	MediaTypeLayerGzip = MediaTypeLayer + "+gzip"
)

// NewBlob wraps data.
func NewBlob(mediaType string, data []byte) Blob {
	return Blob{MediaType: mediaType, Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(data)), Size: int64(len(data)), Data: data}
}

// GzipLayer makes a gzip layer of a tar.
func GzipLayer(tar []byte) (Blob, error) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(tar); err != nil {
		return Blob{}, err
	}
	if err := z.Close(); err != nil {
		return Blob{}, err
	}
	layer := NewBlob(MediaTypeLayerGzip, b.Bytes())
	layer.DiffID = NewBlob("", tar).Digest
	return layer, nil
}

// PlainLayer makes an uncompressed layer of a tar.
func PlainLayer(tar []byte) Blob {
	layer := NewBlob(MediaTypeLayer, tar)
	layer.DiffID = layer.Digest
	return layer
}

// Push pushes an image of these layers, bottom first, as repository:tag, and
// returns the digest of its manifest. Layers with no Data are named in the
// manifest but not pushed.
func (r *Registry) Push(ctx context.Context, repository, tag string, cmd []string, layers ...Blob) (string, error) {
	diffIDs := make([]string, 0, len(layers))
	for _, l := range layers {
		diffIDs = append(diffIDs, l.DiffID)
	}
	cfg, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Cmd": cmd, "Env": []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		return "", err
	}
	config := NewBlob(MediaTypeConfig, cfg)
	for _, b := range append([]Blob{config}, layers...) {
		if b.Data == nil {
			continue
		}
		if err := r.PushBlob(ctx, repository, b); err != nil {
			return "", err
		}
	}
	man, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": MediaTypeManifest, "config": config, "layers": layers,
	})
	if err != nil {
		return "", err
	}
	return r.PushManifest(ctx, repository, tag, MediaTypeManifest, man)
}

// PushManifest pushes a manifest or an index and returns its digest.
func (r *Registry) PushManifest(ctx context.Context, repository, tag, mediaType string, data []byte) (string, error) {
	u := "http://" + r.Addr + "/v2/" + repository + "/manifests/" + tag
	return NewBlob("", data).Digest, r.send(ctx, http.MethodPut, u, mediaType, data, nil)
}

// PushBlob pushes one blob.
func (r *Registry) PushBlob(ctx context.Context, repository string, b Blob) error {
	var location string
	err := r.send(ctx, http.MethodPost, "http://"+r.Addr+"/v2/"+repository+"/blobs/uploads/", "", nil,
		func(resp *http.Response) { location = resp.Header.Get("Location") })
	if err != nil {
		return err
	}
	u, err := url.Parse(location)
	if err != nil {
		return err
	}
	q := u.Query()
	q.Set("digest", b.Digest)
	u.RawQuery = q.Encode()
	return r.send(ctx, http.MethodPut, u.String(), "application/octet-stream", b.Data, nil)
}

func (r *Registry) send(ctx context.Context, method, u, contentType string, body []byte, got func(*http.Response)) error {
	req, err := http.NewRequestWithContext(ctx, method, u, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := r.lab.client().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	msg, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, u, resp.Status, msg)
	}
	if got != nil {
		got(resp)
	}
	return nil
}
