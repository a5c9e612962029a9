package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// recovery is one attempt to get the index of a lost diff again.
type recovery struct {
	done chan struct{} // closed when err is set
	err  error
}

// mount is Data.Mount. A diff that a snapshot stands for and the data path has not,
// since its files were lost or damaged, is opened again from the supernode: that
// goes on when ctx ends, for the next one who wants it.
func (s *Snapshotter) mount(ctx context.Context, id blockdev.Digest) (string, error) {
	dir, err := s.cfg.Data.Mount(ctx, id)
	if !errors.Is(err, blockdev.ErrNotFound) || s.cfg.Images == nil {
		return dir, err
	}
	r := s.startRecover(id)
	if r == nil {
		return "", errClosing
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		return "", fmt.Errorf("%w; its index is being fetched again: %w: %w", errLost, context.Cause(ctx), blockdev.ErrUnavailable)
	}
	if r.err != nil {
		return "", fmt.Errorf("%w; its index could not be fetched again: %w", err, r.err)
	}
	return s.cfg.Data.Mount(ctx, id)
}

var errLost = errors.New("the diff's files were lost or damaged")

// startRecover returns the attempt for a diff; nil: the snapshotter is closed.
func (s *Snapshotter) startRecover(id blockdev.Digest) *recovery {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.base.Err() != nil {
		return nil
	}
	if r := s.recoveries[id]; r != nil {
		return r
	}
	r := &recovery{done: make(chan struct{})}
	s.recoveries[id] = r
	s.bg.Go(func() {
		r.err = s.recover(s.base, id)
		s.mu.Lock()
		delete(s.recoveries, id)
		s.mu.Unlock()
		close(r.done)
	})
	return r
}

// recover adds again what is missing of an image that has this diff.
func (s *Snapshotter) recover(ctx context.Context, id blockdev.Digest) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.IndexTimeout)
	defer cancel()
	// One at a time: an image whose diffs are all gone is opened once.
	select {
	case s.recovering <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.recovering }()
	if _, err := s.cfg.Data.Mount(ctx, id); !errors.Is(err, blockdev.ErrNotFound) {
		return err // nil: another diff's image had this one as well
	}
	list, err := s.records.images()
	if err != nil {
		return err
	}
	err = errors.New("no recorded image has it")
	for _, rec := range list {
		if !slices.ContainsFunc(rec.Layers, func(l Layer) bool { return l.DiffID == id }) {
			continue
		}
		if err = s.reopen(ctx, rec, id); err == nil {
			s.log.Warn("a diff was lost; its index has been fetched again", "diff", id, "image", rec.Ref)
			return nil
		}
		err = fmt.Errorf("image %s: %w", rec.Ref, err)
	}
	return err
}

func (s *Snapshotter) reopen(ctx context.Context, rec imageRecord, id blockdev.Digest) error {
	req := image.Request{Ref: rec.Ref, Manifest: rec.Manifest, Platform: s.cfg.Platform}
	var err error
	if req.Credential, err = s.SourceCredential(ctx, rec.Ref); err != nil {
		return err
	}
	at := place{room: s.room}
	defer at.leave()
	img, err := s.indexes(ctx, req, &at)
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
