package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// errClosing is for those who wait when the snapshotter ends.
var errClosing = fmt.Errorf("the snapshotter is being closed: %w", errdefs.ErrUnavailable)

// errSlow is the cause of a context that ends since a call has taken its time.
var errSlow = errors.New("the time for the call is used up")

// limit bounds a call: containerd holds a lock over most of them, and waits with
// its garbage collection, and with all that waits for that.
func (s *Snapshotter) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, s.cfg.PrepareTimeout, errSlow)
}

// prepareLazy answers a Prepare that carries labelRef. It returns an error that
// is AlreadyExists if the layer is now there as a lazy snapshot, nil if it has to
// be unpacked by containerd, and another error if neither will do.
func (s *Snapshotter) prepareLazy(ctx context.Context, key, parent string, info snapshots.Info) error {
	w, err := parseWant(info.Labels)
	if err != nil {
		s.rights.distrust(namespaceOf(key), time.Now())
		s.explainUnlabelled(w, parent, err)
		return nil
	}
	// A sixth of the time is left for what comes after it.
	wait, cancel := context.WithTimeoutCause(ctx, s.cfg.PrepareTimeout*5/6, errSlow)
	defer cancel()
	pk := pullKey{namespace: namespaceOf(key), ref: w.ref, manifest: w.manifest}
	p, leave, abandon := s.pulls.join(pk, w.chain, func() *opening {
		s.rights.claim(w.name)
		return s.openings.join(w.key(), false, s.preparer(w))
	})
	last, err := s.answer(ctx, wait, p, w, key, parent, info.Labels)
	if err == nil || errdefs.IsAlreadyExists(err) {
		leave(last)
	} else {
		abandon()
	}
	return err
}

// answer is prepareLazy within a pull: last says that there is no layer above. wait
// ends before ctx.
func (s *Snapshotter) answer(ctx, wait context.Context, p *pull, w want, key, parent string, labels map[string]string) (last bool, err error) {
	refuse := func(c Cause, why string) (bool, error) {
		s.pulls.refuse(p, false)
		p.explain.Do(func() { s.notLazy(w, c, why) })
		return false, nil
	}
	o, err := s.pulls.wait(wait, p)
	if why := s.policy.Load().NotLazy(w.ref); why != "" && err == nil {
		err = refused(why) // the mirror may not have known the image by this name
	}
	switch {
	case s.base.Err() != nil:
		return false, errClosing
	case ctx.Err() != nil && !errors.Is(context.Cause(ctx), errSlow):
		return false, fmt.Errorf("image %s: wait for its indexes: %w", w.ref, ctx.Err())
	case errors.Is(err, errSlow):
		return refuse(CauseSlow, fmt.Sprintf("its indexes did not come within %v (prepare_timeout); the node still waits for them, and the next pull finds them here",
			s.cfg.PrepareTimeout*5/6))
	case errors.As(err, new(refused)):
		s.pulls.refuse(p, true)
		p.explain.Do(func() {
			s.refusals.add(w.ref, CauseConfig, err.Error())
			s.log.Info("image is not lazy, because the config says so; containerd unpacks it", "image", w.ref, "error", err)
		})
		return false, nil
	case err != nil:
		return refuse(causeOf(err), cause(err, s.cfg.IndexTimeout))
	case o == nil:
		return false, nil
	}
	if ns := namespaceOf(key); o.private && s.rights.distrusted(ns, time.Now()) {
		return refuse(CauseUnauthorized, fmt.Sprintf("containerd's namespace %q has asked for layers without the name of their image within the last %v, "+
			"so the name could come from any manifest, and a private image is opened for none of them: "+
			"set disable_snapshot_annotations = false in the CRI section of containerd's config", ns, distrustFor))
	}
	i := o.position(w.chain)
	if i < 0 {
		// Not what containerd has, or labels that lie: it is of no use to this pull.
		s.pulls.refuse(p, true)
	}
	if why, err := s.misplaced(ctx, o, i, parent); err != nil {
		return false, err
	} else if why != "" {
		if i < 0 {
			return refuse(CauseCorrupt, why)
		}
		return refuse(CauseOrder, why)
	}
	if err := s.rename(p, o, w.ref); err != nil {
		return false, err
	}
	last = i == len(o.Layers)-1
	if last {
		s.waitPrefetch(wait, w, o, labels)
	}
	if err := s.commitLazy(ctx, key, parent, o.Layers[i].DiffID, labels); err != nil {
		if errors.Is(err, errFixup) && (ctx.Err() == nil || errors.Is(context.Cause(ctx), errSlow)) {
			return refuse(causeOf(err), err.Error())
		}
		return false, fmt.Errorf("image %s, layer %d of %d: %w", w.ref, i+1, len(o.Layers), err)
	}
	if last {
		if err := s.release(o.Manifest); err != nil {
			s.log.Error("cannot remove the keep mark of an image; if the image is removed, its diffs stay until the next start",
				"image", w.ref, "error", err)
		}
		s.refusals.forget(w.ref)
		s.rights.drop(w.key()) // the next pull shows its own
		rec := o.imageRecord
		rec.Ref = w.ref
		s.imagePulled(&rec)
	}
	return last, fmt.Errorf("snapshot %s is lazy: %w", w.chain, errdefs.ErrAlreadyExists)
}

// rename puts an image that the mirror has opened on record under the name that
// containerd has for it.
func (s *Snapshotter) rename(p *pull, o *openImage, ref string) (err error) {
	if o.Ref != ref {
		p.name.Do(func() { err = s.records.rename(o.imageRecord, ref) })
	}
	return err
}

// opener is what opens the wanted image on the word of a credential.
func (s *Snapshotter) opener(w want, cred image.Credential) opener {
	return opener{cred: cred, open: func(ctx context.Context) (*openImage, error) { return s.open(ctx, w, cred) }}
}

// preparer is what opens an image that a Prepare asks for.
func (s *Snapshotter) preparer(w want) opener {
	return opener{open: func(ctx context.Context) (*openImage, error) {
		cred, err := s.pullCredential(ctx, w)
		if err != nil {
			return nil, err
		}
		return s.open(ctx, w, cred)
	}}
}

// notLazy writes the one line that says why.
func (s *Snapshotter) notLazy(w want, c Cause, why string) {
	s.refusals.add(w.ref, c, why)
	s.log.Warn("image is not lazy; containerd unpacks it", "image", w.ref, "manifest", w.manifest, "error", why)
}

// explainUnlabelled writes that line for an image whose name is not known: once,
// for the lowest layer that is asked for.
func (s *Snapshotter) explainUnlabelled(w want, parent string, why error) {
	s.mu.Lock()
	above := parent != "" && s.unlabelled == parentChain(parent)
	s.unlabelled = w.chain
	s.mu.Unlock()
	if !above {
		s.refusals.add(w.ref, CauseUnlabelled, why.Error())
		s.log.Warn("image is not lazy; containerd unpacks it", "image", w.ref, "chain", w.chain, "error", why)
	}
}

// misplaced says why layer i cannot go on this parent; empty: the parent is the
// chain below it.
func (s *Snapshotter) misplaced(ctx context.Context, o *openImage, i int, parent string) (why string, err error) {
	if i < 0 {
		return "the DiffIDs that the supernode sent do not give the ChainID that containerd has from the image config", nil
	}
	if i == 0 && parent == "" {
		return "", nil
	}
	if i == 0 || parent == "" {
		return fmt.Sprintf("layer %d is requested on parent %q: layers that are unpacked in parallel cannot be lazy "+
			"(the proxy plugin must not have the capability \"rebase\")", i+1, parent), nil
	}
	below, err := s.chainOf(ctx, parent)
	if err != nil {
		return "", err
	}
	if below != o.chains[i-1] {
		return fmt.Sprintf("layer %d is requested on %s, which is not the chain below it, %s", i+1, below, o.chains[i-1]), nil
	}
	return "", nil
}

// chainOf is the ChainID of a committed snapshot.
func (s *Snapshotter) chainOf(ctx context.Context, name string) (string, error) {
	chain := parentChain(name)
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
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
func (s *Snapshotter) waitPrefetch(ctx context.Context, w want, o *openImage, labels map[string]string) {
	v := labels[LabelPrefetch]
	if v == "" {
		return
	}
	if v != PrefetchWait {
		s.log.Warn("label is ignored: "+LabelPrefetch+" can only be "+PrefetchWait, "value", v, "image", w.ref)
		return
	}
	// All at once, so that the link is never idle at the end of a layer.
	for _, l := range o.Layers {
		s.cfg.Data.Prefetch(l.DiffID)
	}
	for _, l := range o.Layers {
		if err := s.cfg.Data.PrefetchWait(ctx, l.DiffID, nil); err != nil {
			s.log.Info("the pull does not wait for all bytes of the image; the missing bytes are still being fetched",
				"image", w.ref, "layer", l.Digest, "error", err)
			return
		}
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
	needed, err := fixup(ctx, filepath.Join(tmp, "fs"), implied, own, lowers)
	if err != nil || !needed {
		return "", errors.Join(err, os.RemoveAll(tmp))
	}
	return tmp, nil
}
