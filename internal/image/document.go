package image

import (
	"context"

	"github.com/shoalfs/shoal/blockdev"
)

// DocumentKind says under which of a registry's paths a document is.
type DocumentKind uint8

const (
	// ManifestDocument is an image manifest or an image index.
	ManifestDocument DocumentKind = iota
	// ConfigDocument is a blob that a manifest names as its image's config.
	ConfigDocument
)

// MaxDocument is the largest document, in bytes.
const MaxDocument = 8 << 20

// DocumentRequest asks for one of the small documents that a client reads before
// it asks for layers.
type DocumentRequest struct {
	// Ref names it: "host/repository:tag" or "host/repository@sha256:...". A
	// config is named by its digest.
	Ref  string
	Kind DocumentKind
	// Head asks for everything but the bytes.
	Head bool
	// Credential is the node's for Ref's registry.
	Credential Credential
	// Alive, if not nil, is called when the source gives a sign that it is at work. It
	// must not block.
	Alive func()
}

// Document is a manifest, an image index or an image config, byte for byte as its
// registry has it.
type Document struct {
	Digest blockdev.Digest
	// MediaType is "application/octet-stream" for configs: only the manifest that
	// names one knows more.
	MediaType string
	// Size is the length of Data, also where Data was not asked for.
	Size int64
	Data []byte
}

// DocumentSource is where documents come from: a supernode.
type DocumentSource interface {
	// Document returns a document that the request's credential may read. What a
	// tag names may be known from a short while ago, or from the last time that
	// the registry answered. The caller checks Data against the digest. Errors
	// wrap blockdev.ErrNotFound, ErrUnauthorized, ErrUnsupported, ErrUnavailable,
	// ErrCorrupt or the context's error, and name the document and the cause. A
	// blob that no manifest has made known as a config is ErrNotFound.
	Document(ctx context.Context, req DocumentRequest) (*Document, error)
}
