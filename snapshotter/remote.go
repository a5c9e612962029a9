package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
)

// errClosing is for those who wait when the snapshotter ends.
var errClosing = fmt.Errorf("the snapshotter is being closed: %w", errdefs.ErrUnavailable)

// prepareLazy answers a Prepare that carries labelRef. It returns an error that
// is AlreadyExists if the layer is now there as a lazy snapshot, nil if it has to
// be unpacked in the ordinary way, and another error if neither will do.
func (s *Snapshotter) prepareLazy(ctx context.Context, key, parent string, info snapshots.Info) error {
	w, err := parseWant(info.Labels)
	if err != nil {
		s.explainUnlabelled(w, parent, err)
		return nil
	}
	pk := pullKey{namespace: namespaceOf(key), ref: w.ref, manifest: w.manifest}
	p, leave, err := s.pulls.join(ctx, pk, w.chain, func(ctx context.Context) (*openImage, error) {
		o, err := s.open(ctx, w)
		switch {
		case errors.As(err, new(refused)):
			s.log.Info("image is not lazy, as the config says: containerd unpacks it in the ordinary way", "image", w.ref, "cause", err)
		case err != nil && !errors.Is(err, context.Canceled):
			s.notLazy(w, cause(err, s.cfg.IndexTimeout))
		}
		return o, err
	})
	if err != nil {
		return fmt.Errorf("image %s: wait for its indexes: %w", w.ref, err)
	}
	last := false
	defer func() { leave(last) }()
	if p.err != nil {
		if s.base.Err() != nil {
			return errClosing
		}
		return nil
	}

	i := p.image.position(w.chain)
	if why, err := s.misplaced(ctx, p.image, i, parent); err != nil {
		return err
	} else if why != "" {
		p.explain.Do(func() { s.notLazy(w, why) })
		return nil
	}
	last = i == len(p.image.Layers)-1
	if last {
		if err := s.wait(ctx, p.image, info.Labels); err != nil {
			last = false
			return fmt.Errorf("image %s: %w", w.ref, err)
		}
	}
	if err := s.commitLazy(ctx, key, parent, p.image.Layers[i].DiffID, info.Labels); err != nil {
		return fmt.Errorf("image %s, layer %d of %d: %w", w.ref, i+1, len(p.image.Layers), err)
	}
	if last {
		if err := s.release(p.image.Manifest); err != nil {
			s.log.Error("image stays marked as kept, removing it will not free its diffs before the next start",
				"image", w.ref, "error", err)
		}
	}
	return fmt.Errorf("snapshot %s is lazy: %w", w.chain, errdefs.ErrAlreadyExists)
}

// notLazy writes the one line that says why.
func (s *Snapshotter) notLazy(w want, why string) {
	s.log.Warn("image is not lazy, containerd unpacks it in the ordinary way", "image", w.ref, "manifest", w.manifest, "cause", why)
}

// explainUnlabelled writes that line for an image whose name is not known: once,
// for the lowest layer that is asked for.
func (s *Snapshotter) explainUnlabelled(w want, parent string, why error) {
	s.mu.Lock()
	above := parent != "" && s.unlabelled == parentChain(parent)
	s.unlabelled = w.chain
	s.mu.Unlock()
	if !above {
		s.log.Warn("image is not lazy, containerd unpacks it in the ordinary way", "image", w.ref, "chain", w.chain, "cause", why)
	}
}

// misplaced says why layer i cannot go on this parent; empty: the parent is the
// chain below it.
func (s *Snapshotter) misplaced(ctx context.Context, o *openImage, i int, parent string) (why string, err error) {
	if i < 0 {
		return "a layer's ChainID is not one of the image", nil
	}
	if i == 0 && parent == "" {
		return "", nil
	}
	if i == 0 || parent == "" {
		return fmt.Sprintf("layer %d is asked for on parent %q: layers that are unpacked in parallel cannot be lazy "+
			"(the proxy plugin must not have the capability \"rebase\")", i+1, parent), nil
	}
	below := parentChain(parent)
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, parent)
		if ref := info.Labels[labelRef]; err == nil && ref != "" {
			below = ref
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("parent snapshot: %w", err)
	}
	if below != o.chains[i-1] {
		return fmt.Sprintf("layer %d is asked for on %s, which is not the chain below it, %s", i+1, below, o.chains[i-1]), nil
	}
	return "", nil
}

// wait is LabelPrefetch.
func (s *Snapshotter) wait(ctx context.Context, o *openImage, labels map[string]string) error {
	switch v := labels[LabelPrefetch]; v {
	case "":
		return nil
	case PrefetchWait:
	default:
		return fmt.Errorf("label %s=%q: its only value is %q: %w", LabelPrefetch, v, PrefetchWait, errdefs.ErrInvalidArgument)
	}
	data, ok := s.cfg.Data.(PrefetchWaiter)
	if !ok {
		return fmt.Errorf("label %s: this node cannot wait: %w", LabelPrefetch, errdefs.ErrNotImplemented)
	}
	// All at once, so that the link is never idle at the end of a layer.
	for _, l := range o.Layers {
		s.cfg.Data.Prefetch(l.DiffID)
	}
	for _, l := range o.Layers {
		if err := data.PrefetchWait(ctx, l.DiffID); err != nil {
			return classify(fmt.Errorf("prefetch layer %s: %w", l.Digest, err))
		}
	}
	return nil
}

// commitLazy commits a snapshot that stands for a diff, which the caller holds,
// under the name of its ChainID. One that is there already is as good.
func (s *Snapshotter) commitLazy(ctx context.Context, key, parent string, diff blockdev.Digest, labels map[string]string) (err error) {
	fixup, err := s.makeFixup(ctx, parent, diff)
	if err != nil {
		return err
	}
	labels = maps.Clone(labels)
	labels[labelDiff] = diff.String()
	if fixup != "" {
		labels[labelFixup] = "true"
		defer func() {
			if _, err := os.Lstat(fixup); err == nil { // not taken
				s.removeDir(fixup)
			}
		}()
	}
	exists := false
	// Before it can be seen, and so removed.
	s.refs.addSnapshot(diff)
	defer func() {
		if err != nil || exists {
			s.refs.dropSnapshot(diff)
		}
	}()
	return s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		// The name is free unless another namespace has an image with this chain, on
		// a parent that may be another snapshot of the same layers.
		name := labels[labelRef]
		for _, n := range []string{name, name + "@" + parent} {
			_, info, _, err := storage.GetInfo(ctx, n)
			if errdefs.IsNotFound(err) {
				name = n
				break
			} else if err != nil {
				return err
			}
			if id, lazy, err := diffOf(info); err != nil {
				return err
			} else if lazy && id == diff && info.Parent == parent && info.Labels[labelRef] == name {
				exists = true
				return nil
			}
		}
		sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent, snapshots.WithLabels(labels))
		if err != nil {
			return err
		}
		if fixup != "" {
			if err := s.claim(sn.ID, func(dir string) error { return os.Rename(fixup, dir) }); err != nil {
				return err
			}
		}
		_, err = storage.CommitActive(ctx, key, name, snapshots.Usage{}, snapshots.WithLabels(labels))
		return err
	})
}

// makeFixup makes the fix-ups of a diff on top of a chain, in scratch, as a directory
// to be renamed to that of a snapshot. Empty if none are needed.
func (s *Snapshotter) makeFixup(ctx context.Context, parent string, diff blockdev.Digest) (string, error) {
	if parent == "" {
		return "", nil
	}
	implied, err := s.records.implied(diff)
	if err != nil || len(implied) == 0 {
		return "", err
	}
	links, err := s.chain(ctx, parent)
	if err != nil {
		return "", err
	}
	lowers, err := s.lowers(ctx, links)
	if err != nil {
		return "", err
	}
	return s.buildFixup(ctx, diff, implied, lowers)
}

func (s *Snapshotter) buildFixup(ctx context.Context, diff blockdev.Digest, implied, lowers []string) (string, error) {
	own, err := s.cfg.Data.Mount(ctx, diff)
	if err != nil {
		return "", classify(fmt.Errorf("mount diff %s: %w", diff, err))
	}
	tmp, err := os.MkdirTemp(s.scratch(), "fixup-")
	if err != nil {
		return "", err
	}
	needed, err := fixup(filepath.Join(tmp, "fs"), implied, own, lowers)
	if err != nil || !needed {
		return "", errors.Join(err, os.RemoveAll(tmp))
	}
	return tmp, nil
}
