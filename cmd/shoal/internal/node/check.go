package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/cmd/shoal/internal/super"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/snapshotter"
)

// Check checks a running node.
func (d *Daemon) Check(ctx context.Context, req control.CheckRequest, event func(string)) (*control.CheckReport, error) {
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
	if err := d.up.check(ctx, r, event); err != nil {
		return nil, err
	}
	r.Judge(req.Repair)
	return r, nil
}

// embeddedDir is where below a node's root a supernode lives in it.
const embeddedDir = "supernode"

// CheckRoot checks the data directory of a node that does not run.
func CheckRoot(ctx context.Context, r *control.CheckReport, root string, repair bool, progress func(string), log *slog.Logger) error {
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
	embedded := filepath.Join(root, embeddedDir)
	switch _, err := os.Stat(filepath.Join(embedded, "store")); {
	case errors.Is(err, os.ErrNotExist):
		return nil // this node embeds none
	case err != nil:
		return err
	}
	return super.CheckRoot(ctx, r, embedded, repair, progress, log)
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
