package exchange

import (
	"context"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

// ReportProfiles implements blockdev.ProfileSink: one report and one answer for
// each diff, on one stream. A diff that the server does not take does not keep
// the others from being reported; the error is the first of these.
func (c *Client) ReportProfiles(ctx context.Context, profiles []blockdev.DiffProfile) error {
	if len(profiles) == 0 {
		return nil
	}
	if err := c.reports.enter(ctx); err != nil {
		return c.explain(err)
	}
	defer c.reports.leave()
	if err := c.ready(ctx); err != nil {
		return c.explain(err)
	}
	if err := c.report(ctx, profiles); err != nil {
		return c.explain(c.cause(ctx, err, c.opts.ImageTimeout))
	}
	return nil
}

func (c *Client) report(ctx context.Context, profiles []blockdev.DiffProfile) (err error) {
	st, err := c.reports.get(ctx, false)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = st.Reset() })
	keep := false
	defer func() {
		if stop() && keep {
			c.reports.put(st, time.Now())
		} else {
			c.reports.drop(st)
		}
	}()
	var refused error
	for i := range profiles {
		if err := st.SetDeadline(time.Now().Add(c.opts.ImageTimeout)); err != nil {
			return err
		}
		if st.out, err = wire.AppendMessage(st.out[:0], wire.NewProfileReport(&profiles[i])); err != nil {
			return err
		}
		if _, err := st.Write(st.out); err != nil {
			return err
		}
		b, err := wire.ReadFrame(st.r, wire.MaxProfileAnswer, nil)
		if err != nil {
			return err
		}
		if err := wire.ParseProfileAnswer(b); err != nil && refused == nil {
			refused = fmt.Errorf("startup profile of diff %v: %w", profiles[i].Diff, err)
		}
	}
	keep = true
	return refused
}
