package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/cmd/shoal/internal/control"
	"github.com/shoalfs/shoal/internal/boltcheck"
	"github.com/shoalfs/shoal/snapshotter"
	"github.com/shoalfs/shoal/supernode"
	"github.com/shoalfs/shoal/supernode/store"
)

// checkRoot checks the data directory of a daemon that does not run.
func checkRoot(ctx context.Context, root string, repair bool, progress func(string), log *slog.Logger) (*control.CheckReport, error) {
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, err
	}
	r := &control.CheckReport{Root: root, Findings: []blockdev.Finding{}}
	switch {
	case isDir(root, "diffs"):
		r.Role = "node"
		err = checkNodeRoot(ctx, r, root, repair, progress, log)
		if err == nil && isDir(root, "supernode", "store") {
			err = checkSupernodeRoot(ctx, r, filepath.Join(root, "supernode"), repair, progress, log)
		}
	case isDir(root, "store"):
		r.Role = "supernode"
		err = checkSupernodeRoot(ctx, r, root, repair, progress, log)
	default:
		return nil, fmt.Errorf("%s has neither the directory diffs of a node nor the directory store of a supernode: is it the right directory?", root)
	}
	if errors.Is(err, cache.ErrInUse) || errors.Is(err, boltcheck.ErrInUse) {
		return nil, fmt.Errorf("%s: a daemon uses it: check it through the daemon, without --root (with --control if its socket is not the default one): %w", root, err)
	}
	if err != nil {
		return nil, err
	}
	r.Judge(repair)
	return r, nil
}

func checkNodeRoot(ctx context.Context, r *control.CheckReport, root string, repair bool, progress func(string), log *slog.Logger) error {
	progress("layers in " + root)
	in, err := cache.Inspect(ctx, root)
	if err != nil {
		return err
	}
	// Without a repair, what one would do is not said to be done.
	if !repair {
		for i := range in.Findings {
			in.Findings[i].Repaired = ""
		}
	} else if len(in.Findings) > 0 {
		if err := repairDiffs(ctx, root, in, log); err != nil {
			return err
		}
	}
	addInspection(r, in)
	progress("mounts in " + root)
	mounts, found, err := volume.InspectMounts(root, repair)
	if err != nil {
		return err
	}
	r.Mounts += mounts
	r.Findings = append(r.Findings, found...)
	progress("databases in " + root)
	h, err := snapshotter.Inspect(ctx, root, repair)
	if err != nil {
		return err
	}
	addHealth(r, h)
	return nil
}

// repairDiffs repairs what was found, and looks whether that was of use.
func repairDiffs(ctx context.Context, root string, in *cache.Inspection, log *slog.Logger) error {
	after, err := cache.Repair(ctx, root, in.Damaged, log)
	if err != nil {
		return err
	}
	left := make(map[string]bool)
	for _, f := range after.Findings {
		left[f.Where] = true
	}
	for i := range in.Findings {
		if left[in.Findings[i].Where] {
			in.Findings[i].Repaired = ""
		}
	}
	return nil
}

func checkSupernodeRoot(ctx context.Context, r *control.CheckReport, root string, repair bool, progress func(string), log *slog.Logger) error {
	progress("store in " + root)
	h, err := supernode.Inspect(ctx, root, repair, log)
	if err != nil {
		return err
	}
	addStore(r, h)
	r.Databases += 3
	return nil
}

func addInspection(r *control.CheckReport, in *cache.Inspection) {
	r.Layers += in.Diffs
	r.Complete += in.Complete
	r.Proven += in.Proven
	r.Chunks += in.Chunks
	r.Bytes += in.Bytes
	r.Findings = append(r.Findings, in.Findings...)
}

func addHealth(r *control.CheckReport, h *snapshotter.Health) {
	r.Databases += h.Databases
	r.Snapshots += h.Snapshots
	r.Findings = append(r.Findings, h.Findings...)
}

func addStore(r *control.CheckReport, h *store.Health) {
	r.Layers += h.Diffs
	r.Complete += h.Diffs
	r.Chunks += h.Chunks
	r.Bytes += h.Bytes
	r.Findings = append(r.Findings, h.Findings...)
}

// Check checks a running node.
func (d *nodeDaemon) Check(ctx context.Context, req control.CheckRequest, event func(string)) (*control.CheckReport, error) {
	r := &control.CheckReport{Role: "node", Findings: []blockdev.Finding{}}
	in, mounts, err := d.vols.Verify(ctx, req.Repair, func(id blockdev.Digest) { event("layer " + id.String()) })
	if err != nil {
		return nil, err
	}
	addInspection(r, in)
	r.Mounts = mounts
	event("databases")
	h, err := d.sn.Check(ctx, req.Repair)
	if err != nil {
		return nil, err
	}
	addHealth(r, h)
	if d.embedded != nil {
		event("store")
		sh, err := d.embedded.Check(ctx)
		if err != nil {
			return nil, err
		}
		addStore(r, sh)
		r.Databases++
	}
	r.Judge(req.Repair)
	return r, nil
}

// Check checks a running supernode.
func (d *supernodeDaemon) Check(ctx context.Context, req control.CheckRequest, event func(string)) (*control.CheckReport, error) {
	event("store")
	h, err := d.s.Check(ctx)
	if err != nil {
		return nil, err
	}
	r := &control.CheckReport{Role: "supernode", Databases: 1, Findings: []blockdev.Finding{}}
	addStore(r, h)
	r.Judge(req.Repair)
	return r, nil
}
