package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
)

// mount is Data.Mount. A diff that a snapshot stands for and the data path has not,
// since its files were lost or damaged, is opened again from the supernode.
func (s *Snapshotter) mount(ctx context.Context, id blockdev.Digest) (string, error) {
	dir, err := s.cfg.Data.Mount(ctx, id)
	if !errors.Is(err, blockdev.ErrNotFound) || s.cfg.Images == nil {
		return dir, err
	}
	// One at a time: an image whose diffs are all gone is opened once.
	select {
	case s.recovering <- struct{}{}:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { <-s.recovering }()
	if dir, err := s.cfg.Data.Mount(ctx, id); !errors.Is(err, blockdev.ErrNotFound) {
		return dir, err
	}
	if rerr := s.recover(ctx, id); rerr != nil {
		return "", fmt.Errorf("%w; to get its index again failed, too: %w", err, rerr)
	}
	return s.cfg.Data.Mount(ctx, id)
}

// recover adds again what is missing of an image that has this diff.
func (s *Snapshotter) recover(ctx context.Context, id blockdev.Digest) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.IndexTimeout)
	defer cancel()
	list, err := s.records.images()
	if err != nil {
		return err
	}
	err = errors.New("no image on record has it")
	for _, rec := range list {
		if !slices.ContainsFunc(rec.Layers, func(l Layer) bool { return l.DiffID == id }) {
			continue
		}
		if err = s.reopen(ctx, rec, id); err == nil {
			s.log.Warn("diff was lost, its index has been fetched again", "diff", id, "image", rec.Ref)
			return nil
		}
		err = fmt.Errorf("image %s: %w", rec.Ref, err)
	}
	return err
}

func (s *Snapshotter) reopen(ctx context.Context, rec imageRecord, id blockdev.Digest) error {
	req := blockdev.ImageRequest{Ref: rec.Ref, Manifest: rec.Manifest, Platform: s.cfg.Platform}
	var err error
	if s.cfg.Credentials != nil {
		if req.Credential, err = s.cfg.Credentials.Credential(ctx, rec.Ref); err != nil {
			return err
		}
	}
	img, err := s.cfg.Images.OpenImage(ctx, req)
	if err != nil {
		return err
	}
	found := false
	for _, l := range img.Layers {
		// The DiffID is what was proven when the image was pulled.
		known := slices.ContainsFunc(rec.Layers, func(k Layer) bool { return k.DiffID == l.DiffID })
		if l.Index == nil || !known {
			continue
		}
		if _, err := s.addIndex(ctx, l.DiffID, l.Index); err != nil {
			return err
		}
		found = found || l.DiffID == id
	}
	if !found {
		return fmt.Errorf("its index did not come: %w", blockdev.ErrNotFound)
	}
	return nil
}
