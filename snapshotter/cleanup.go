package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// Cleanup frees what removed snapshots have left: directories, diffs that nobody
// uses any more, and records of images that are gone. What takes longer than
// Config.PrepareTimeout goes on in the background.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	ctx, cancel := s.limit(ctx)
	defer cancel()
	done := make(chan error, 1)
	if !s.tasks.Run(func() { done <- s.cleanup(s.tasks.Context()) }) {
		return images.ErrClosed
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		if err := context.Cause(ctx); !errors.Is(err, images.ErrSlow) {
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
		return images.ErrClosed
	}
	defer func() { <-s.cleaning }()
	trash, err := s.survey(ctx)
	for _, dir := range trash {
		s.removeDir(dir)
	}
	if err != nil {
		return err
	}
	return s.images.Cleanup(ctx)
}

// survey moves directories that belong to no snapshot to scratch. It does so in the
// write transaction that making a snapshot needs: an id whose transaction failed is
// given out again.
func (s *Snapshotter) survey(ctx context.Context) (trash []string, err error) {
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := snapshotIDs(ctx)
		if err != nil {
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
		return nil
	})
	return trash, err
}

// start derives the uses of diffs from the metadata, and mounts in the background what
// active snapshots use.
func (s *Snapshotter) start() error {
	ctx := s.tasks.Context()
	active := make(map[string]snapshots.Info)
	var use []blockdev.Digest
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted {
				active[info.Name] = info
			}
			// A label that does not parse makes that chain fail, and no other.
			diff, lazy, err := diffOf(info)
			if err != nil {
				s.log.Error("a label of a lazy snapshot is damaged; containers on this snapshot do not start", "snapshot", info.Name, "error", err)
			} else if lazy {
				use = append(use, diff)
			}
			return nil
		})
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("read snapshots: %w", err)
	}
	if _, err := s.survey(ctx); err != nil {
		return err
	}
	// What survey has found is in scratch now, with what an earlier process left there.
	left, err := os.ReadDir(s.scratch())
	if err != nil {
		return err
	}
	if err := s.images.Start(ctx, s.meta, use); err != nil {
		return err
	}
	s.tasks.Run(func() {
		for _, e := range left {
			if ctx.Err() != nil {
				return
			}
			s.removeDir(filepath.Join(s.scratch(), e.Name()))
		}
	})
	s.tasks.Run(func() { s.mountActive(ctx, active) })
	return nil
}

// mountActive mounts what running containers, and those to be started again, read
// from. One chain that fails does not stop the others: Mounts tries it again.
func (s *Snapshotter) mountActive(ctx context.Context, active map[string]snapshots.Info) {
	for name, info := range active {
		if ctx.Err() != nil {
			return
		}
		links, err := s.meta.chain(ctx, info.Parent)
		if err == nil {
			_, err = s.lowers(ctx, links)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("cannot mount the layers of a snapshot; the start of its container tries again",
				"snapshot", name, "error", err)
		}
		s.containerFound(ctx, name, info, links)
	}
}
