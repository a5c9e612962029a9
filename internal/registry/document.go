package registry

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/image"
)

// Document returns a manifest, an image index or a config as blockdev's
// DocumentSource has it. Like Resolve, it does not ask for what is in the cache
// for this repository, and an answer does not mean that the registry lets the
// credential in.
//
// With an image manifest its config comes into the cache, too: it is what is
// asked for next, perhaps when the registry is down. A config is only ever
// answered from there, so that a layer never takes this way.
func (c *Client) Document(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
	r, err := ParseReference(req.Ref)
	if err != nil {
		return nil, err
	}
	q := &query{c: c, ref: r, name: req.Ref, cred: req.Credential}
	if req.Kind == image.ConfigDocument {
		b, ok := c.cache.doc(r.Name(), r.Digest, maxConfig)
		if !ok {
			return nil, q.wrap(fmt.Errorf("not known as the config of an image: %w", blockdev.ErrNotFound))
		}
		return answer(req, r.Digest, "application/octet-stream", b), nil
	}
	var b []byte
	var d blockdev.Digest
	manifest := func(named blockdev.Digest) (err error) {
		d = named
		b, err = q.document(ctx, ocispec.MediaTypeImageManifest, descriptor{digest: d, size: -1}, maxManifest)
		return err
	}
	if err := q.follow(ctx, r.Digest, manifest); err != nil {
		return nil, err
	}
	doc, err := parseDocument(b)
	if err != nil {
		return nil, q.wrap(err)
	}
	mediaType := doc.mediaType()
	if config := doc.Config; c.cache != nil && config != nil && images.IsConfigType(config.MediaType) && !q.kept(*config) {
		// What waits for a registry holds no bytes: the manifest is in the cache by now.
		doc, b = nil, nil
		q.keepConfig(ctx, *config)
		if err := manifest(d); err != nil {
			return nil, q.wrap(err)
		}
	}
	return answer(req, d, mediaType, b), nil
}

func answer(req image.DocumentRequest, d blockdev.Digest, mediaType string, b []byte) *image.Document {
	doc := &image.Document{Digest: d, MediaType: mediaType, Size: int64(len(b))}
	if !req.Head {
		doc.Data = b
	}
	return doc
}

// kept says whether the cache has a config.
func (q *query) kept(desc ocispec.Descriptor) bool {
	config, err := checkDescriptor("config", desc, maxConfig)
	if err != nil {
		return false
	}
	_, ok := q.c.cache.doc(q.ref.Name(), config.digest, maxConfig)
	return ok
}

// keepConfig brings the config into the cache. Without it the manifest is as good.
func (q *query) keepConfig(ctx context.Context, desc ocispec.Descriptor) {
	config, err := checkDescriptor("config", desc, maxConfig)
	if err == nil {
		_, err = q.document(ctx, config.mediaType, config, maxConfig)
	}
	if err == nil || ctx.Err() != nil {
		return
	}
	if others, say := q.c.said.Say("config", q.name, time.Now()); say {
		q.c.log.Warn("cannot fetch an image's config; its manifest is used without it", "image", q.name, "error", err, "others", others)
	}
}

// mediaType is what the document says of itself; OCI lets it say nothing.
func (doc *document) mediaType() string {
	switch {
	case doc.MediaType != "":
		return doc.MediaType
	case doc.Config != nil:
		return ocispec.MediaTypeImageManifest
	}
	return ocispec.MediaTypeImageIndex
}

// question is one that a registry is being asked; the answer is set when it is done.
type question struct {
	digest blockdev.Digest
	data   []byte
}

// ask joins the question key, or asks it; it goes on when those that asked leave. The
// error of one that leaves is that of ctx, with its cause.
func (c *Client) ask(ctx context.Context, key string, ask func(context.Context, *question) error) (*question, error) {
	a, err := c.asking.Join(key, func() (*question, flight.Work) {
		f := new(question)
		return f, func(ctx context.Context) error { return ask(ctx, f) }
	})
	if err != nil {
		return nil, err
	}
	defer a.Leave()
	select {
	case <-a.Done():
		return a.State, a.Err()
	case <-ctx.Done():
		if cause := context.Cause(ctx); errors.Is(cause, errSlow) {
			return nil, &Error{kind: blockdev.ErrUnavailable, text: cause.Error()}
		}
		return nil, fmt.Errorf("asking the registry: %w", ctx.Err())
	}
}

var errClosed = fmt.Errorf("registry client is closed: %w", blockdev.ErrUnavailable)
