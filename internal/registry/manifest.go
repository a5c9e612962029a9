package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sort"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// Limits for what a registry sends, in bytes and entries. Real manifests have
// some kilobytes, real configs up to some hundred; overlayfs takes 127 layers or
// so (more with short paths).
const (
	maxManifest  = 4 << 20
	maxConfig    = 8 << 20
	maxLayers    = 1000
	maxManifests = 1000
	maxLayerSize = 1 << 40
)

// layerTypes are the media types of layers that are tar streams, plain or
// compressed with gzip or zstd, and not encrypted. The compression is found out
// from the bytes, not from here: Docker's plain type may be compressed.
var layerTypes = map[string]bool{
	ocispec.MediaTypeImageLayer:                                    true,
	ocispec.MediaTypeImageLayerGzip:                                true,
	ocispec.MediaTypeImageLayerZstd:                                true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": true,
	images.MediaTypeDockerSchema2Layer:                             true,
	images.MediaTypeDockerSchema2LayerGzip:                         true,
	images.MediaTypeDockerSchema2LayerZstd:                         true,
	images.MediaTypeDockerSchema2LayerForeign:                      true,
	images.MediaTypeDockerSchema2LayerForeignGzip:                  true,
}

// Layer is one layer of a manifest.
type Layer struct {
	// Digest, Size (bytes) and MediaType are the manifest's descriptor.
	Digest    blockdev.Digest
	Size      int64
	MediaType string
	// DiffID is the image config's. Nothing but unpacking the layer proves it.
	DiffID blockdev.Digest
}

// Manifest is an image for one platform.
type Manifest struct {
	// Ref is the request's.
	Ref string
	// Host and Repository are Ref's: "docker.io", "library/redis".
	Host, Repository string
	// Digest is that of the platform's manifest, never of an image index.
	Digest blockdev.Digest
	// Layers are ordered from the bottom up.
	Layers []Layer
}

// document is what can be at a manifest's place: an image manifest, an image
// index, or Docker's equivalents and predecessors.
type document struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	FSLayers      []json.RawMessage    `json:"fsLayers"`
}

type descriptor struct {
	digest    blockdev.Digest
	size      int64
	mediaType string
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, blockdev.ErrUnsupported)...)
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, blockdev.ErrCorrupt)...)
}

// parseDocument reads a manifest or an image index; exactly one of doc.Config
// and doc.Manifests is set afterwards. What the document says of itself counts,
// not the Content-Type it came with: only the former is covered by the digest.
func parseDocument(b []byte) (*document, error) {
	var doc document
	if err := json.Unmarshal(b, &doc); err != nil {
		if bytes.HasPrefix(bytes.TrimSpace(b), []byte("<")) {
			return nil, corrupt("the manifest is a web page: a mirror or a proxy answers instead of the registry")
		}
		return nil, corrupt("the manifest is not readable JSON")
	}
	switch {
	case doc.SchemaVersion == 1 || len(doc.FSLayers) > 0:
		return nil, unsupported("the manifest has Docker's schema 1, which has no DiffIDs")
	case doc.SchemaVersion != 2:
		return nil, unsupported("the manifest has schema version %d", doc.SchemaVersion)
	}
	isIndex := images.IsIndexType(doc.MediaType)
	isImage := images.IsManifestType(doc.MediaType)
	switch {
	case doc.MediaType != "" && !isIndex && !isImage:
		return nil, unsupported("media type %.100q is not an image", doc.MediaType)
	case doc.Manifests != nil && (doc.Config != nil || doc.Layers != nil):
		// Two readers could take it for different things.
		return nil, corrupt("the manifest is both an image and an image index")
	case isIndex && doc.Config != nil, isImage && doc.Manifests != nil:
		return nil, corrupt("the manifest's content is not what its media type says")
	case doc.Manifests == nil && doc.Config == nil:
		return nil, unsupported("the manifest has neither a config nor manifests")
	case len(doc.Manifests) > maxManifests:
		return nil, unsupported("the image index has %d entries, more than %d", len(doc.Manifests), maxManifests)
	case len(doc.Layers) > maxLayers:
		return nil, unsupported("the image has %d layers, more than %d", len(doc.Layers), maxLayers)
	}
	return &doc, nil
}

func checkDescriptor(what string, d ocispec.Descriptor, limit int64) (descriptor, error) {
	dg, err := blockdev.ParseDigest(string(d.Digest))
	if err != nil {
		return descriptor{}, unsupported("%s: digest %.100q is not a SHA-256", what, d.Digest)
	}
	if d.Size < 0 || d.Size > limit {
		return descriptor{}, unsupported("%s: size %d is not within 0..%d", what, d.Size, limit)
	}
	return descriptor{dg, d.Size, d.MediaType}, nil
}

// erofsType is a layer to containerd from 2.3 on.
const erofsType = "application/vnd.erofs.layer.v1"

// unpacks says whether containerd unpacks what has this media type as a layer, or
// refuses to. Everything else that a manifest lists (a model's weights as they are, a
// signature) it fetches and leaves alone, and the config has no DiffID for it.
func unpacks(mediaType string) bool {
	return images.IsLayerType(mediaType) || mediaType == erofsType
}

// imageParts checks an image manifest's descriptors. The layers are those that
// containerd unpacks.
func imageParts(doc *document) (config descriptor, layers []descriptor, err error) {
	if mt := doc.Config.MediaType; !images.IsConfigType(mt) {
		return descriptor{}, nil, unsupported("the manifest is one of an artifact, which containerd does not unpack: its config has media type %.100q, "+
			"and that of a container image has %q", mt, ocispec.MediaTypeImageConfig)
	}
	if config, err = checkDescriptor("config", *doc.Config, maxConfig); err != nil {
		return descriptor{}, nil, err
	}
	sizes := map[blockdev.Digest]int64{}
	for i, l := range doc.Layers {
		if !unpacks(l.MediaType) {
			continue
		}
		if !layerTypes[l.MediaType] {
			return descriptor{}, nil, unsupported("layer %d (%.80s) has media type %.100q", i, l.Digest, l.MediaType)
		}
		d, err := checkDescriptor(fmt.Sprintf("layer %d", i), l, maxLayerSize)
		if err != nil {
			return descriptor{}, nil, err
		}
		if s, ok := sizes[d.digest]; ok && s != d.size {
			return descriptor{}, nil, corrupt("layer %d (%s) is listed with two sizes", i, d.digest)
		}
		sizes[d.digest] = d.size
		layers = append(layers, d)
	}
	if n := len(doc.Layers); n > 0 && len(layers) == 0 {
		return descriptor{}, nil, unsupported("none of the %d blobs of the image is a layer that containerd unpacks: the first one has media type %.100q", n, doc.Layers[0].MediaType)
	}
	return config, layers, nil
}

type imageConfig struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
	RootFS       struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// parseConfig reads an image config and joins its DiffIDs to the layers.
func parseConfig(b []byte, layers []descriptor) ([]Layer, *imageConfig, error) {
	var cfg imageConfig
	if err := json.Unmarshal(b, &cfg); err != nil {
		return nil, nil, corrupt("the image config is not readable JSON")
	}
	if t := cfg.RootFS.Type; t != "layers" && (t != "" || len(cfg.RootFS.DiffIDs) == 0) { // OCI wants it, and containerd takes an image without it
		return nil, nil, unsupported("the image config's rootfs has type %.40q", t)
	}
	if len(cfg.RootFS.DiffIDs) != len(layers) {
		return nil, nil, corrupt("the image config lists %d DiffIDs for %d layers", len(cfg.RootFS.DiffIDs), len(layers))
	}
	out := make([]Layer, len(layers))
	diffs := map[blockdev.Digest]blockdev.Digest{}
	for i, l := range layers {
		id, err := blockdev.ParseDigest(cfg.RootFS.DiffIDs[i])
		if err != nil {
			return nil, nil, unsupported("DiffID %.100q is not a SHA-256", cfg.RootFS.DiffIDs[i])
		}
		if prev, ok := diffs[l.digest]; ok && prev != id {
			return nil, nil, corrupt("layer %s is listed with two DiffIDs", l.digest)
		}
		diffs[l.digest] = id
		out[i] = Layer{Digest: l.digest, Size: l.size, MediaType: l.mediaType, DiffID: id}
	}
	return out, &cfg, nil
}

func ociPlatform(p image.Platform) ocispec.Platform {
	return platforms.Normalize(ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant})
}

// maxGuesses bounds how many entries without a platform are looked at.
const maxGuesses = 8

// choose orders an image index's entries for a platform: the best match first,
// then those that do not say what they are for (guess), whose configs do.
func choose(doc *document, want ocispec.Platform) (match, guess []ocispec.Descriptor) {
	m := platforms.Only(want)
	for _, d := range doc.Manifests {
		switch {
		case d.MediaType != "" && !images.IsManifestType(d.MediaType) && !images.IsIndexType(d.MediaType):
		case d.Platform == nil:
			if len(guess) < maxGuesses {
				guess = append(guess, d)
			}
		case m.Match(*d.Platform):
			match = append(match, d)
		}
	}
	sort.SliceStable(match, func(i, j int) bool { return m.Less(*match[i].Platform, *match[j].Platform) })
	return match, guess
}
