package images

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
)

// recoveries get the indexes of lost diffs again.
type recoveries struct {
	opener  *opener
	flights *flight.Group[blockdev.Digest, struct{}]
	one     chan struct{} // held by the attempt that is under way
}

func newRecoveries(op *opener) *recoveries {
	return &recoveries{op, flight.New[blockdev.Digest, struct{}](flight.Policy{Outlives: true}, ErrClosed), make(chan struct{}, 1)}
}

// mount is Data.Mount. A diff that a snapshot stands for and the data path has not,
// since its files were lost or damaged, is opened again from the supernode: that
// goes on when ctx ends, for the next one that wants it.
func (rs *recoveries) mount(ctx context.Context, id blockdev.Digest) (string, error) {
	dir, err := rs.opener.cfg.Data.Mount(ctx, id)
	if !errors.Is(err, blockdev.ErrNotFound) || rs.opener.cfg.Images == nil {
		return dir, err
	}
	again, jerr := rs.flights.Join(id, func() (struct{}, flight.Work) {
		return struct{}{}, func(ctx context.Context) error { return rs.recover(ctx, id) }
	})
	if jerr != nil {
		return "", jerr
	}
	defer again.Leave()
	select {
	case <-again.Done():
	case <-ctx.Done():
		return "", fmt.Errorf("%w; its index is being fetched again: %w: %w", errLost, context.Cause(ctx), blockdev.ErrUnavailable)
	}
	if again.Err() != nil {
		return "", fmt.Errorf("%w; its index could not be fetched again: %w", err, again.Err())
	}
	return rs.opener.cfg.Data.Mount(ctx, id)
}

var errLost = errors.New("the diff's files were lost or damaged")

// recover adds again what is missing of an image that has this diff.
func (rs *recoveries) recover(ctx context.Context, id blockdev.Digest) error {
	op := rs.opener
	ctx, cancel := context.WithTimeout(ctx, op.cfg.IndexTimeout)
	defer cancel()
	// One at a time: an image whose diffs are all gone is opened once.
	select {
	case rs.one <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-rs.one }()
	if _, err := op.cfg.Data.Mount(ctx, id); !errors.Is(err, blockdev.ErrNotFound) {
		return err // nil: another diff's image had this one as well
	}
	list, err := op.records.images()
	if err != nil {
		return err
	}
	err = errors.New("no recorded image has it")
	for _, rec := range list {
		if !slices.ContainsFunc(rec.Layers, func(l Layer) bool { return l.DiffID == id }) {
			continue
		}
		if err = op.reopen(ctx, rec, id); err == nil {
			op.cfg.Log.Warn("a diff was lost; its index has been fetched again", "diff", id, "image", rec.Ref)
			return nil
		}
		err = fmt.Errorf("image %s: %w", rec.Ref, err)
	}
	return err
}

// reopen adds the indexes of an image on record again, that of a diff among them.
func (op *opener) reopen(ctx context.Context, rec imageRecord, id blockdev.Digest) error {
	req, err := op.again(ctx, rec.Ref, rec.Manifest)
	if err != nil {
		return err
	}
	at := place{room: op.room}
	defer at.leave()
	img, err := op.indexes(ctx, req, &at)
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
		if _, err := op.addIndex(ctx, l.DiffID, l.Index); err != nil {
			return err
		}
		found = found || l.DiffID == id
	}
	if !found {
		return fmt.Errorf("its index did not come: %w", blockdev.ErrNotFound)
	}
	return nil
}
