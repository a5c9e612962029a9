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
	"github.com/shoalfs/shoal/snapshotter/images"
)

// limit bounds a call: containerd holds a lock over most of them, and waits with
// its garbage collection, and with all that waits for that. Close ends it, too.
func (s *Snapshotter) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, end := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.tasks.Context(), func() { end(images.ErrClosed) })
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.PrepareTimeout, images.ErrSlow)
	return ctx, func() {
		cancel()
		stop()
		end(nil)
	}
}

// prepareLazy answers a Prepare that carries labelRef. It returns an error that
// is AlreadyExists if the layer is now there as a lazy snapshot, nil if it has to
// be unpacked by containerd, and another error if neither will do.
func (s *Snapshotter) prepareLazy(ctx context.Context, key, parent string, info snapshots.Info) error {
	chain := info.Labels[labelRef]
	w, err := parseWant(info.Labels)
	if err != nil {
		s.images.Unlabelled(namespaceOf(key), chain, parentChain(parent), w.Ref, err)
		return nil
	}
	p := s.images.Join(namespaceOf(key), chain, w)
	last, err := s.answer(ctx, p, key, parent, info.Labels)
	if err == nil || errdefs.IsAlreadyExists(err) {
		p.Leave(last)
	} else {
		p.Abandon()
	}
	return err
}

// answer is prepareLazy within a pull: last says that there is no layer above.
func (s *Snapshotter) answer(ctx context.Context, p *images.Pull, key, parent string, labels map[string]string) (last bool, err error) {
	// A sixth of the time is left for what comes after it.
	patience := s.cfg.PrepareTimeout * 5 / 6
	wait, cancel := context.WithTimeoutCause(ctx, patience, images.ErrSlow)
	defer cancel()
	o, i, err := p.Layer(wait)
	switch {
	case errors.Is(err, images.ErrSlow):
		p.Refuse(images.CauseSlow, fmt.Sprintf("its indexes did not come within %v (prepare_timeout); the node still waits for them, and the next pull finds them here", patience))
		return false, nil
	case err != nil || o == nil:
		return false, err
	}
	if why, err := s.misplaced(ctx, o.Chains, i, parent); err != nil {
		return false, err
	} else if why != "" {
		p.Refuse(images.CauseOrder, why)
		return false, nil
	}
	if err := p.Rename(o); err != nil {
		return false, err
	}
	last = i == len(o.Layers)-1
	if last {
		s.waitPrefetch(wait, p, o, labels)
	}
	if err := s.commitLazy(ctx, key, parent, o.Layers[i].DiffID, labels); err != nil {
		if errors.Is(err, errFixup) && (ctx.Err() == nil || errors.Is(context.Cause(ctx), images.ErrSlow)) {
			p.Refuse(images.CauseOf(err), err.Error())
			return false, nil
		}
		return false, fmt.Errorf("image %s, layer %d of %d: %w", o.Ref, i+1, len(o.Layers), err)
	}
	if last {
		p.Done(o)
	}
	return last, fmt.Errorf("snapshot %s is lazy: %w", o.Chains[i], errdefs.ErrAlreadyExists)
}

// misplaced says why layer i of these chains cannot go on this parent; empty: the
// parent is the chain below it.
func (s *Snapshotter) misplaced(ctx context.Context, chains []string, i int, parent string) (why string, err error) {
	if i == 0 && parent == "" {
		return "", nil
	}
	if i == 0 || parent == "" {
		return fmt.Sprintf("layer %d is requested on parent %q: layers that are unpacked in parallel cannot be lazy "+
			"(the proxy plugin must not have the capability \"rebase\")", i+1, parent), nil
	}
	below, err := s.meta.chainOf(ctx, parent)
	if err != nil {
		return "", err
	}
	if below != chains[i-1] {
		return fmt.Sprintf("layer %d is requested on %s, which is not the chain below it, %s", i+1, below, chains[i-1]), nil
	}
	return "", nil
}

// chainOf is the ChainID of a committed snapshot.
func (m *metaStore) chainOf(ctx context.Context, name string) (string, error) {
	chain := parentChain(name)
	err := m.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, name)
		if ref := info.Labels[labelRef]; err == nil && ref != "" {
			chain = ref
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("parent snapshot: %w", err)
	}
	return chain, nil
}

// waitPrefetch is LabelPrefetch. It is a wish and not believed: a layer's
// annotations in any manifest become labels.
func (s *Snapshotter) waitPrefetch(ctx context.Context, p *images.Pull, o *images.Opened, labels map[string]string) {
	switch v := labels[LabelPrefetch]; v {
	case "":
	case PrefetchWait:
		p.WaitBytes(ctx, o)
	default:
		s.log.Warn("label is ignored: "+LabelPrefetch+" can only be "+PrefetchWait, "value", v, "image", o.Ref)
	}
}

// errFixup is part of an error of commitLazy with which the layer can still be
// unpacked in the ordinary way.
var errFixup = errors.New("its directories cannot be combined with those of the layers below")

// commitLazy commits a snapshot that stands for a diff, which the caller holds,
// under the name of its ChainID. One that is there already is as good.
func (s *Snapshotter) commitLazy(ctx context.Context, key, parent string, diff blockdev.Digest, labels map[string]string) (err error) {
	fixup, err := s.makeFixup(ctx, parent, diff)
	if err != nil {
		return fmt.Errorf("%w: %w", errFixup, err)
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
	s.images.AddSnapshot(diff)
	defer func() {
		if err != nil || exists {
			s.images.DropSnapshot(diff)
		}
	}()
	return s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
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
	implied, err := s.images.Implied(diff)
	if err != nil || len(implied) == 0 {
		return "", err
	}
	links, err := s.meta.chain(ctx, parent)
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
	own, err := s.images.Mount(ctx, diff)
	if err != nil {
		return "", classify(fmt.Errorf("mount diff %s: %w", diff, err))
	}
	tmp, err := os.MkdirTemp(s.scratch(), "fixup-")
	if err != nil {
		return "", err
	}
	needed, err := fixup(ctx, filepath.Join(tmp, "fs"), implied, own, lowers)
	if err != nil || !needed {
		return "", errors.Join(err, os.RemoveAll(tmp))
	}
	return tmp, nil
}
