package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// Cleanup frees what removed snapshots have left: directories, diffs that nobody
// uses any more, and records of images that are gone. What takes longer than
// Config.PrepareTimeout goes on in the background.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	ctx, cancel := s.limit(ctx)
	defer cancel()
	done := make(chan error, 1)
	s.mu.Lock()
	if s.base.Err() != nil {
		s.mu.Unlock()
		return errClosing
	}
	s.bg.Go(func() { done <- s.cleanup(s.base) })
	s.mu.Unlock()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		if err := context.Cause(ctx); !errors.Is(err, errSlow) {
			return err
		}
		s.log.Info("the cleanup of removed snapshots goes on in the background")
		return nil
	}
}

// cleanup is one Cleanup at a time.
func (s *Snapshotter) cleanup(ctx context.Context) error {
	select {
	case s.cleaning <- struct{}{}:
	case <-ctx.Done():
		return errClosing
	}
	defer func() { <-s.cleaning }()
	trash, _, err := s.survey(ctx)
	for _, dir := range trash {
		s.removeDir(dir)
	}
	if err != nil {
		return err
	}
	s.sweep(ctx)
	if err := s.pruneImages(ctx); err != nil {
		return err
	}
	return s.dropKeys()
}

// survey moves directories that belong to no snapshot to scratch, and lists the
// ChainIDs of lazy snapshots. It does so in the write transaction that making a
// snapshot needs: an id whose transaction failed is given out again.
func (s *Snapshotter) survey(ctx context.Context) (trash []string, chains map[string]struct{}, err error) {
	chains = make(map[string]struct{})
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil && !errdefs.IsNotFound(err) { // NotFound: never had a snapshot
			return err
		}
		for _, sub := range []string{"s", "l"} {
			entries, err := os.ReadDir(filepath.Join(s.cfg.Root, sub))
			if err != nil {
				return err
			}
			for _, e := range entries {
				if _, ok := ids[e.Name()]; ok {
					continue
				}
				dir, err := s.discard(filepath.Join(s.cfg.Root, sub, e.Name()))
				if err != nil {
					return err
				}
				trash = append(trash, dir)
			}
		}
		return walkChains(ctx, chains)
	})
	return trash, chains, err
}

// discard moves a directory, with what is mounted in it, to a new name in scratch.
func (s *Snapshotter) discard(dir string) (string, error) {
	tmp, err := os.MkdirTemp(s.scratch(), "gone-")
	if err != nil {
		return "", err
	}
	return tmp, unix.Rename(dir, tmp) // onto the empty directory, which os.Rename refuses
}

// removeDir removes a directory in scratch. A failure is logged: the next start tries
// again.
func (s *Snapshotter) removeDir(dir string) {
	// What is mounted inside must not be descended into.
	err := unmountClones(filepath.Join(dir, "i"))
	if err == nil {
		err = os.RemoveAll(dir)
	}
	if err != nil {
		s.log.Warn("cannot remove the directory of a removed snapshot", "path", dir, "error", err)
	}
}

// sweep removes the diffs that nobody uses from the data path, and says how many.
func (s *Snapshotter) sweep(ctx context.Context) (removed int) {
	if s.usesUnknown() {
		return 0
	}
	for _, id := range s.refs.unused() {
		if ctx.Err() != nil {
			return removed
		}
		if !s.refs.startRemove(id) {
			continue
		}
		err := s.removeDiff(ctx, id)
		s.refs.finishRemove(id, err == nil)
		if err != nil {
			s.log.Warn("cannot remove an unused diff", "diff", id, "error", err)
		} else {
			removed++
		}
	}
	return removed
}

func (s *Snapshotter) removeDiff(ctx context.Context, id blockdev.Digest) error {
	if err := s.cfg.Data.Remove(ctx, id); err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		return err
	}
	if err := s.leaveGroups(id); err != nil {
		return err
	}
	return s.records.forget(id)
}

// pruneImages drops records of images whose top layer has no snapshot, that are not
// kept, and that no pull is opening. The snapshots are looked at while no record can
// change: a pull commits the top layer first and notes its end in the record then, so it
// is seen here, or writes the record again.
func (s *Snapshotter) pruneImages(ctx context.Context) error {
	gone, left, err := s.records.prune(func(list []imageRecord) (stale []imageRecord, err error) {
		chains, err := s.lazyChains(ctx)
		if err != nil {
			return nil, err
		}
		for _, img := range list {
			underWay := !img.Pulled && time.Since(img.Opened) < s.cfg.PullIdle
			if _, ok := chains[img.Top]; !ok && !img.Kept && !underWay {
				stale = append(stale, img)
			}
		}
		return stale, nil
	})
	if err != nil || s.cfg.Groups == nil {
		return err
	}
	for _, img := range gone {
		if !slices.ContainsFunc(left, func(other imageRecord) bool { return other.Manifest == img.Manifest }) {
			s.cfg.Groups.Leave(img.Manifest)
		}
	}
	return nil
}

// start derives who uses what from the metadata, removes what nobody does, and
// mounts in the background what active snapshots use.
func (s *Snapshotter) start() error {
	ctx := s.base
	active := make(map[string]snapshots.Info)
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted {
				active[info.Name] = info
			}
			// A label that does not parse makes that chain fail, and no other.
			diff, lazy, err := diffOf(info)
			if err != nil {
				s.log.Error("a label of a lazy snapshot is damaged; containers on this snapshot do not start", "snapshot", info.Name, "error", err)
			} else if lazy {
				s.refs.addSnapshot(diff)
			}
			return nil
		})
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("read snapshots: %w", err)
	}
	if err := s.adoptDiffs(); err != nil {
		return err
	}
	listed, err := s.records.diffs()
	if err != nil {
		return err
	}
	for _, id := range append(listed, s.cfg.Data.Diffs()...) {
		s.refs.known(id)
	}
	_, chains, err := s.survey(ctx)
	if err != nil {
		return err
	}
	if err := s.startKept(chains); err != nil {
		return err
	}
	if err := s.pruneImages(ctx); err != nil {
		return err
	}
	if err := s.joinGroups(chains); err != nil {
		return err
	}
	// What survey has found is in scratch now, with what an earlier process left there.
	left, err := os.ReadDir(s.scratch())
	if err != nil {
		return err
	}
	s.bg.Go(func() {
		for _, e := range left {
			if ctx.Err() != nil {
				return
			}
			s.removeDir(filepath.Join(s.scratch(), e.Name()))
		}
		s.sweep(ctx)
	})
	if err := s.startWishes(); err != nil {
		return err
	}
	s.bg.Go(func() { s.mountActive(ctx, active) })
	s.watching.Go(func() { s.wishes.watch(ctx) })
	s.watching.Go(func() { s.forgetKeys(ctx) })
	return nil
}

// startKept counts kept images, and releases those that were pulled just before the
// last process ended.
func (s *Snapshotter) startKept(chains map[string]struct{}) error {
	list, err := s.records.images()
	if err != nil {
		return err
	}
	for _, img := range list {
		if img.Kept {
			s.refs.keep(img.diffs(), 1)
		}
	}
	for _, img := range list {
		if _, pulled := chains[img.Top]; img.Kept && pulled {
			if err := s.release(img.Manifest); err != nil {
				return err
			}
		}
	}
	return nil
}

// mountActive mounts what running containers, and those to be started again, read
// from. One chain that fails does not stop the others: Mounts tries it again.
func (s *Snapshotter) mountActive(ctx context.Context, active map[string]snapshots.Info) {
	for name, info := range active {
		if ctx.Err() != nil {
			return
		}
		links, err := s.chain(ctx, info.Parent)
		if err == nil {
			_, err = s.lowers(ctx, links)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("cannot mount the layers of a snapshot; the start of its container tries again",
				"snapshot", name, "error", err)
		}
		s.wish(ctx, name, info, links)
	}
}
