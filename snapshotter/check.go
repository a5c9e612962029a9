package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// Health is what a check of a snapshotter has looked at and found.
type Health struct {
	Databases, Snapshots int
	Findings             []blockdev.Finding
}

func (h *Health) add(where, format string, args ...any) {
	h.Findings = append(h.Findings, blockdev.Finding{Where: where, Problem: fmt.Sprintf(format, args...)})
}

// Check checks the databases while the snapshotter is in use. With repair it also
// does what Cleanup does, and says what that has removed; without, what the next
// Cleanup removes by itself is no finding.
func (s *Snapshotter) Check(ctx context.Context, repair bool) (*Health, error) {
	h := &Health{Databases: 2}
	if err := s.images.Check(); err != nil {
		h.add(images.File, "%v: the next start of the node sets the file aside", err)
	}
	before := &Health{}
	// In the transaction that makes snapshots, so that none is seen half made.
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := snapshotIDs(ctx)
		if err != nil {
			return err
		}
		h.Snapshots = len(ids)
		return before.orphans(s.cfg.Root, ids)
	})
	if err != nil {
		h.add(metadataFile, "%v: the next start of the node sets the file aside", err)
		return h, nil
	}
	h.aside(s.cfg.Root)
	if !repair {
		return h, nil
	}
	if err := s.Cleanup(ctx); err != nil {
		return nil, err
	}
	for _, f := range before.Findings {
		if _, err := os.Lstat(f.Where); errors.Is(err, fs.ErrNotExist) {
			f.Repaired = "removed"
			h.Findings = append(h.Findings, f)
		}
	}
	return h, nil
}

// snapshotIDs needs a transaction.
func snapshotIDs(ctx context.Context) (map[string]string, error) {
	ids, err := storage.IDMap(ctx)
	if errdefs.IsNotFound(err) { // never had a snapshot
		return nil, nil
	}
	return ids, err
}

// Inspect checks databases and directories below root while no Snapshotter has it
// open; if one has, the error wraps boltcheck.ErrInUse. With repair, damaged databases
// are left for New to set aside, and what belongs to no snapshot is removed.
func Inspect(ctx context.Context, root string, repair bool) (*Health, error) {
	h := &Health{}
	sound := true
	for _, db := range []struct {
		name    string
		inspect func(root string) error
	}{{images.File, images.Inspect}, {metadataFile, inspectMetadata}} {
		err := db.inspect(root)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case errors.Is(err, blockdev.ErrCorrupt):
			sound = false
			h.add(db.name, "%v: the next start of the node sets the file aside", err)
		case err != nil:
			return nil, err
		}
		h.Databases++
	}
	h.aside(root)
	if !sound {
		return h, nil
	}
	if _, err := os.Lstat(filepath.Join(root, metadataFile)); errors.Is(err, fs.ErrNotExist) {
		return h, nil
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, metadataFile))
	if err != nil {
		return nil, err
	}
	before := len(h.Findings)
	err = ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err := snapshotIDs(ctx)
		if err != nil {
			return err
		}
		h.Snapshots = len(ids)
		if !repair { // what a removed snapshot has left goes at the next start
			return nil
		}
		return h.orphans(root, ids)
	})
	if err := errors.Join(err, ms.Close()); err != nil {
		return nil, err
	}
	for i := before; i < len(h.Findings); i++ {
		f := &h.Findings[i]
		// What is mounted inside must not be descended into.
		if err := unmountClones(filepath.Join(f.Where, "i")); err != nil {
			return nil, err
		}
		if err := os.RemoveAll(f.Where); err != nil {
			return nil, err
		}
		f.Repaired = "removed"
	}
	return h, nil
}

// orphans are directories of no snapshot.
func (h *Health) orphans(root string, ids map[string]string) error {
	for _, sub := range []string{"s", "l"} {
		entries, err := os.ReadDir(filepath.Join(root, sub))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if _, ok := ids[e.Name()]; !ok {
				h.add(filepath.Join(root, sub, e.Name()), "belongs to no snapshot")
			}
		}
	}
	return nil
}

// aside finds what was set aside once.
func (h *Health) aside(root string) {
	left, err := filepath.Glob(filepath.Join(root, "*"+asideSuffix+"*"))
	if err != nil { // the pattern is no pattern
		return
	}
	for _, path := range left {
		h.add(path, "was set aside because it was damaged: delete it when no container needs its content")
	}
}
