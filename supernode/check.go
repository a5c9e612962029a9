package supernode

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/profiles"
	"github.com/shoalfs/shoal/supernode/store"
)

// Check checks the store while it is in use: see store.Check.
func (s *Supernode) Check(ctx context.Context) (h *store.Health, err error) {
	err = s.requests.do(ctx, "check", func(ctx context.Context) error {
		h, err = s.store.Check(ctx, true)
		return err
	})
	return h, err
}

// Inspect checks the data directory of a supernode that does not run; if one does,
// the error wraps boltcheck.ErrInUse. With repair, what is damaged is forgotten, to
// be fetched again.
func Inspect(ctx context.Context, dir string, repair bool, log *slog.Logger) (_ *store.Health, err error) {
	small, err := inspectSmall(dir, repair)
	if err != nil {
		return nil, err
	}
	h := &store.Health{}
	root := filepath.Join(dir, "store")
	switch err := store.CheckIndex(root); {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, blockdev.ErrCorrupt) && !repair:
		h.Findings = append(h.Findings, blockdev.Finding{Where: filepath.Join(root, "index.db"), Problem: fmt.Sprintf("%v: the next start begins with an empty store", err)})
	case errors.Is(err, blockdev.ErrCorrupt):
		h.Findings = append(h.Findings, blockdev.Finding{Where: filepath.Join(root, "index.db"), Problem: err.Error(), Repaired: "an empty store is begun: layers are fetched again on request"})
		fallthrough
	case err == nil:
		// Without a quota, and without compressing anything: only what a crash has
		// left is cleaned up.
		s, err := store.Open(store.Config{Dir: root, Log: log, Idle: -1, Thorough: true})
		if err != nil {
			return nil, err
		}
		found, err := s.Check(ctx, repair)
		if err := errors.Join(err, s.Close()); err != nil {
			return nil, err
		}
		found.Findings = append(h.Findings, found.Findings...)
		h = found
	default:
		return nil, err
	}
	h.Findings = append(h.Findings, small...)
	return h, nil
}

// inspectSmall checks the databases beside the store, and with repair sets aside
// those that are damaged.
func inspectSmall(dir string, repair bool) (found []blockdev.Finding, err error) {
	for name, lost := range map[string]string{
		access.File:   access.Lost,
		profiles.File: profiles.Lost,
	} {
		path := filepath.Join(dir, name)
		err := boltcheck.File(path, nil)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if !errors.Is(err, blockdev.ErrCorrupt) {
			return nil, err
		}
		f := blockdev.Finding{Where: path, Problem: fmt.Sprintf("%v: the next start begins with an empty file", err)}
		if repair {
			aside, err := boltcheck.SetAside(path)
			if err != nil {
				return nil, err
			}
			f.Repaired = "set aside as " + aside + ": " + lost
		}
		found = append(found, f)
	}
	return found, nil
}
