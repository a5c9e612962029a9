package supernode

import (
	"context"

	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
)

// DocumentFor is image.DocumentSource's Document on behalf of a peer. It asks
// the registry for what is not known yet.
func (s *Supernode) DocumentFor(ctx context.Context, peer string, req image.DocumentRequest) (doc *image.Document, err error) {
	err = s.requests.do(ctx, req.Ref, func(ctx context.Context) error {
		doc, err = s.document(ctx, peer, req)
		return err
	})
	s.metrics.document(err)
	if err != nil {
		return nil, err
	}
	return doc, nil
}

// Document implements image.DocumentSource for the process that the supernode
// lives in.
func (s *Supernode) Document(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
	return s.DocumentFor(ctx, "", req)
}

func (s *Supernode) document(ctx context.Context, peer string, req image.DocumentRequest) (*image.Document, error) {
	ref, err := registry.ParseReference(req.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.registry.Allowed(ref); err != nil {
		return nil, err
	}
	// Asked first, although a config is answered from the cache or not at all: whether a
	// digest is known here is only for nodes that may read the repository. They have asked
	// for the manifest a moment ago, so the question seldom reaches the registry.
	v, err := s.access.Allow(ctx, peer, ref, image.Request{Ref: req.Ref, Credential: req.Credential})
	if err != nil {
		return nil, err
	}
	var doc *image.Document
	err = v.Try(req.Credential, func(c image.Credential) (err error) {
		req.Credential = c
		doc, err = s.registry.Document(ctx, req)
		return err
	})
	return doc, err
}
