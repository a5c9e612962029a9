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
