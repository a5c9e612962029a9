package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
)

// link is one committed snapshot of a chain.
type link struct {
	id    string
	lazy  bool
	diff  blockdev.Digest // if lazy
	fixup bool            // lazy, and has fix-ups
	layer bool            // of an image, pulled
	chain string          // its ChainID, if it is
}

// mountWorkers bounds how many block images of one chain are mounted at a time.
const mountWorkers = 4

// parentChain is the ChainID in the name of an image layer's snapshot.
func parentChain(name string) string {
	return name[strings.LastIndexByte(name, '/')+1:]
}

// readChain lists a snapshot and those below it, top first. It needs a transaction.
func readChain(ctx context.Context, name string) (links []link, err error) {
	for name != "" {
		id, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("parent snapshot: %w", err)
		}
		l := link{id: id, fixup: info.Labels[labelFixup] != "", layer: info.Labels[labelRef] != "", chain: info.Labels[labelRef]}
		if l.diff, l.lazy, err = diffOf(info); err != nil {
			return nil, err
		}
		links = append(links, l)
		name = info.Parent
	}
	return links, nil
}

// chain is readChain in a transaction of its own.
func (m *metaStore) chain(ctx context.Context, name string) (links []link, err error) {
	err = m.WithTransaction(ctx, false, func(ctx context.Context) error {
		links, err = readChain(ctx, name)
		return err
	})
	return links, err
}

// diffsOf returns the diffs of a chain, each once.
func diffsOf(links []link) []blockdev.Digest {
	var ids []blockdev.Digest
	seen := make(map[blockdev.Digest]struct{}, len(links))
	for _, l := range links {
		if _, again := seen[l.diff]; l.lazy && !again {
			seen[l.diff] = struct{}{}
			ids = append(ids, l.diff)
		}
	}
	return ids
}

// lowers returns the directories that overlayfs is to join for a chain, top first,
// with all block images mounted.
func (s *Snapshotter) lowers(ctx context.Context, links []link) ([]string, error) {
	mounts, err := s.mountAll(ctx, diffsOf(links))
	if err != nil {
		return nil, err
	}
	dirs := s.join(links, mounts)
	for i := len(links) - 1; i >= 0; i-- {
		l := links[i]
		if !l.lazy || !l.fixup {
			continue
		}
		if _, err := os.Lstat(s.upper(l.id)); err == nil {
			continue
		} else if !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		// Lost with the power: its directories are not synced. What is below is
		// complete by now, since this goes upwards.
		if err := s.remakeFixup(ctx, l, s.join(links[i+1:], mounts)); err != nil {
			return nil, fmt.Errorf("fix-ups of diff %s: %w", l.diff, err)
		}
	}
	return dirs, nil
}

// join makes overlayfs' list. overlayfs refuses a directory that is there twice,
// as a layer may be in an image. The upper one has all that the lower one has, and
// hides all that the lower one hides, so the lower one goes.
func (s *Snapshotter) join(links []link, mounts map[blockdev.Digest]string) []string {
	dirs := make([]string, 0, len(links))
	seen := make(map[blockdev.Digest]struct{}, len(mounts))
	for _, l := range links {
		if !l.lazy {
			dirs = append(dirs, s.upper(l.id))
			continue
		}
		if _, again := seen[l.diff]; again {
			continue
		}
		seen[l.diff] = struct{}{}
		if l.fixup {
			dirs = append(dirs, s.upper(l.id))
		}
		dirs = append(dirs, mounts[l.diff])
	}
	return dirs
}

// mountAll mounts block images, and says where.
func (s *Snapshotter) mountAll(ctx context.Context, ids []blockdev.Digest) (map[blockdev.Digest]string, error) {
	dirs := make([]string, len(ids))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(mountWorkers)
	for i, id := range ids {
		g.Go(func() (err error) {
			if dirs[i], err = s.images.Mount(ctx, id); err != nil {
				err = classify(fmt.Errorf("mount diff %s: %w", id, err))
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	mounts := make(map[blockdev.Digest]string, len(ids))
	for i, id := range ids {
		mounts[id] = dirs[i]
	}
	return mounts, nil
}

func (s *Snapshotter) remakeFixup(ctx context.Context, l link, lowers []string) error {
	implied, err := s.images.Implied(l.diff)
	if err != nil {
		return classify(err)
	}
	made, err := s.buildFixup(ctx, l.diff, implied, lowers)
	if err != nil {
		return err
	}
	if made == "" {
		return fmt.Errorf("the layers below have none of its implied directories any more: %w", blockdev.ErrCorrupt)
	}
	defer s.removeDir(made)
	if err := os.MkdirAll(s.dir(l.id), 0o700); err != nil {
		return err
	}
	// Somebody else may have been faster with the same.
	err = os.Rename(filepath.Join(made, "fs"), s.upper(l.id))
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}
