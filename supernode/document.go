package supernode

import (
	"context"
	"errors"
	"fmt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry"
)

// DocumentFor is blockdev.DocumentSource's Document on behalf of a peer. It asks
// the registry for what is not known yet.
func (s *Supernode) DocumentFor(ctx context.Context, peer string, req blockdev.DocumentRequest) (*blockdev.Document, error) {
	doc, err := s.openDocument(ctx, peer, req)
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

func (s *Supernode) openDocument(ctx context.Context, peer string, req blockdev.DocumentRequest) (*blockdev.Document, error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("%.300s: %w", req.Ref, err)
	}
	defer end()
	doc, err := s.document(ctx, peer, req)
	if err != nil && s.ctx.Err() != nil {
		return nil, fmt.Errorf("%.300s: %w", req.Ref, errStopping)
	}
	return doc, err
}

func (s *Supernode) document(ctx context.Context, peer string, req blockdev.DocumentRequest) (*blockdev.Document, error) {
	ref, err := registry.ParseReference(req.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.reg.Allowed(ref); err != nil {
		return nil, err
	}
	if req.Kind == blockdev.Config {
		// Looked for first: a layer's digest must not make a request to the
		// registry out of each of a thousand nodes' mistakes.
		head := req
		head.Head = true
		if _, err := s.reg.Document(ctx, head); err != nil {
			return nil, err
		}
	}
	v, err := s.access.Allow(ctx, peer, ref, blockdev.ImageRequest{Ref: req.Ref, Credential: req.Credential})
	if err != nil {
		return nil, err
	}
	doc, err := s.reg.Document(ctx, req)
	if v.Public && req.Credential != (blockdev.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
		// As for images: an expired credential does not keep anybody from what is
		// public.
		req.Credential = blockdev.Credential{}
		doc, err = s.reg.Document(ctx, req)
	}
	return doc, err
}
