package exchange

import (
	"context"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

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

// serveProfiles takes reports, one after the other, until the client closes the
// stream or leaves it idle.
func (s *Server) serveProfiles(st network.Stream) error {
	r := &byteReader{Reader: st}
	from := st.Conn().RemotePeer()
	for {
		if err := st.SetReadDeadline(time.Now().Add(s.cfg.Limits.IdleTimeout)); err != nil {
			return err
		}
		b, err := wire.ReadFrame(r, wire.MaxProfileReport, nil)
		if isEnd(err) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read report: %w", err)
		}
		p, err := wire.ParseProfileReport(b)
		if err != nil {
			return err
		}
		err = s.takeProfile(from, p)
		s.stats.request(profiles, err)
		a := &wire.ProfileAnswer{}
		if err != nil {
			a.Error = wire.FromError(err)
		}
		if b, err = wire.AppendMessage(b[:0], a); err != nil {
			return err
		}
		if err := st.SetWriteDeadline(time.Now().Add(s.cfg.Limits.WriteTimeout)); err != nil {
			return err
		}
		if _, err := st.Write(b); err != nil {
			return err
		}
	}
}

func (s *Server) takeProfile(from peer.ID, p *blockdev.DiffProfile) error {
	if !s.admit.enter(from, profiles) {
		return fmt.Errorf("reports of this node, or in all, are at their limit: %w", wire.ErrBusy)
	}
	defer s.admit.leave(from, profiles)
	ctx, cancel := context.WithTimeout(s.ctx, s.cfg.Limits.ChunkTimeout)
	defer cancel()
	return s.cfg.Profiles.ReportProfileFrom(ctx, from.String(), *p)
}
