package supernode

import (
	"context"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry"
)

// DocumentFor is blockdev.DocumentSource's Document on behalf of a peer. It asks
// the registry for what is not known yet.
func (s *Supernode) DocumentFor(ctx context.Context, peer string, req blockdev.DocumentRequest) (doc *blockdev.Document, err error) {
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

// Document implements blockdev.DocumentSource for the process that the supernode
// lives in.
func (s *Supernode) Document(ctx context.Context, req blockdev.DocumentRequest) (*blockdev.Document, error) {
	return s.DocumentFor(ctx, "", req)
}

func (s *Supernode) document(ctx context.Context, peer string, req blockdev.DocumentRequest) (*blockdev.Document, error) {
	ref, err := registry.ParseReference(req.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.registry.Allowed(ref); err != nil {
		return nil, err
	}
	if req.Kind == blockdev.Config {
		// Looked for first: a layer's digest must not make a request to the
		// registry out of each of a thousand nodes' mistakes.
		head := req
		head.Head = true
		if _, err := s.registry.Document(ctx, head); err != nil {
			return nil, err
		}
	}
	v, err := s.access.Allow(ctx, peer, ref, blockdev.ImageRequest{Ref: req.Ref, Credential: req.Credential})
	if err != nil {
		return nil, err
	}
	var doc *blockdev.Document
	err = v.Try(req.Credential, func(c blockdev.Credential) (err error) {
		req.Credential = c
		doc, err = s.registry.Document(ctx, req)
		return err
	})
	return doc, err
}
