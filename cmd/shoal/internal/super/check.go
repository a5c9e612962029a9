package super

import (
	"context"
	"log/slog"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/supernode"
	"github.com/shoalfs/shoal/supernode/store"
)

// Check checks a running supernode.
func (d *Daemon) Check(ctx context.Context, req control.CheckRequest, event func(string)) (*control.CheckReport, error) {
	event("store")
	h, err := d.super.Check(ctx)
	if err != nil {
		return nil, err
	}
	r := &control.CheckReport{Role: "supernode", Databases: 1, Findings: []blockdev.Finding{}}
	AddStore(r, h)
	r.Judge(req.Repair)
	return r, nil
}

// CheckRoot checks the data directory of a supernode that does not run.
func CheckRoot(ctx context.Context, r *control.CheckReport, root string, repair bool, progress func(string), log *slog.Logger) error {
	progress("store in " + root)
	h, err := supernode.Inspect(ctx, root, repair, log)
	if err != nil {
		return err
	}
	AddStore(r, h)
	r.Databases += 3
	return nil
}

// AddStore adds to a report what was found in a store.
func AddStore(r *control.CheckReport, h *store.Health) {
	r.Layers += h.Diffs
	r.Complete += h.Diffs
	r.Chunks += h.Chunks
	r.Bytes += h.Bytes
	r.Findings = append(r.Findings, h.Findings...)
}
