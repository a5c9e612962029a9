package supernode

import (
	"context"
	"errors"
	"fmt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
)

// ReportProfileFrom implements exchange.Profiles. Errors wrap
// blockdev.ErrUnauthorized for a diff that the peer was not handed,
// blockdev.ErrNotFound for one that is not stored any more, blockdev.ErrCorrupt
// for chunks that it does not have. A report that tells nothing new is not looked at.
func (s *Supernode) ReportProfileFrom(ctx context.Context, peer string, p blockdev.DiffProfile) error {
	kept, err := s.profiles.Report(peer, p, func() (int, error) {
		// The peer has just asked for the index, so that is in memory as a rule.
		e, err := s.indexes.get(ctx, p.Diff)
		if err != nil {
			return 0, err
		}
		info, err := index.Peek(e.data)
		return info.Chunks, err
	})
	if err != nil {
		return fmt.Errorf("startup profile of diff %s: %w", p.Diff, err)
	}
	if kept {
		s.metrics.profiles.Inc()
	}
	return nil
}

// ReportProfiles implements blockdev.ProfileSink for the process that the
// supernode lives in.
func (s *Supernode) ReportProfiles(ctx context.Context, list []blockdev.DiffProfile) error {
	var errs []error
	for _, p := range list {
		errs = append(errs, s.ReportProfileFrom(ctx, "", p))
	}
	return errors.Join(errs...)
}
