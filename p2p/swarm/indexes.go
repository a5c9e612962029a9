package swarm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/route"
)

const (
	// A relay that needs more than relayTime, and a second for relayRate bytes, is
	// given up. It may be waiting for a relay of its own. The time for bytes is one for
	// all relays of an image: one that sends wrong bytes slowly takes it from itself
	// and the others, and not from the node once for each.
	relayTime = 5 * time.Second
	relayRate = 1 << 20
	// connectRelay is how long it may take to connect to one: it may be a machine that
	// has died a moment ago.
	connectRelay = 500 * time.Millisecond
)

// FetchIndexes implements image.Source: the indexes come from the supernode, or, if
// the request says so, from nodes that it names, which are asked one after the other. What these send is
// checked against the supernode's word, and what none of them has the supernode gives.
// Errors are the supernode's.
func (s *Swarm) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	req.Relay = req.Relay && s.cfg.Enter != nil
	img, err := s.Supernode.FetchIndexes(ctx, req)
	if err != nil || !req.Relay {
		return img, err
	}
	own := s.opened.begin(img)
	defer s.opened.end(own)
	if len(img.Relays) == 0 {
		for i := range img.Layers {
			s.opened.set(own, img.Layers[i].DiffID, img.Layers[i].Index)
		}
		return img, nil
	}
	infos := addrInfos(img.Relays)
	leave := s.cfg.Enter(img, infos)
	err = inTurn(ctx, infos, indexBytes(img), func(ctx context.Context, info peer.AddrInfo) error {
		if s.book.Out(string(info.ID), s.now()) {
			return fmt.Errorf("peer %s has failed a moment ago: %w", info.ID, blockdev.ErrUnavailable)
		}
		err := s.fromRelay(ctx, img, info, own)
		if err != nil {
			if !errors.Is(ctx.Err(), context.Canceled) { // else nobody waits any more
				s.book.Judge(string(info.ID), relayOutcome(err), s.now())
			}
			s.log.Info("a node did not pass on an image's indexes", "image", req.Ref, "peer", info.ID, "error", err)
		}
		return err
	})
	if err != nil && ctx.Err() == nil {
		req.Relay = false
		img, err = s.Supernode.FetchIndexes(ctx, req)
	}
	if err != nil {
		leave()
		return nil, err
	}
	for i := range img.Layers { // for those that wait here in turn
		s.opened.set(own, img.Layers[i].DiffID, img.Layers[i].Index)
	}
	return img, nil
}

// indexBytes is the length of the indexes that relays have.
func indexBytes(img *image.Image) (n int64) {
	for i := range img.Layers {
		n += img.Layers[i].IndexSize
	}
	return n
}

// inTurn asks relays one after the other for size bytes of indexes, until one has
// given the last of them or their time is over.
func inTurn(ctx context.Context, relays []peer.AddrInfo, size int64, ask func(context.Context, peer.AddrInfo) error) (err error) {
	transfer := time.Duration(size) * time.Second / relayRate
	for _, info := range relays {
		began := time.Now()
		turn, cancel := context.WithTimeout(ctx, relayTime+transfer)
		err = ask(turn, info)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
		transfer -= max(0, time.Since(began)-relayTime)
	}
	return err
}

// exactly refuses, before it is read, an index that has another length than the
// supernode has said: there is room for as much as that.
func exactly(l *image.Layer) func(int64) error {
	return func(n int64) error {
		if n != l.IndexSize {
			return fmt.Errorf("an index of %d bytes where %d are expected, of diff %s: %w", n, l.IndexSize, l.DiffID, blockdev.ErrCorrupt)
		}
		return nil
	}
}

// relayOutcome is what is to be remembered of a relay that has failed. It may have been
// waiting for a relay of its own.
func relayOutcome(err error) route.Outcome {
	if errors.Is(err, context.DeadlineExceeded) {
		return route.Slow
	}
	return outcome(err)
}

// addrInfos is which peers relays are, and where they listen.
func addrInfos(relays []image.Relay) (infos []peer.AddrInfo) {
	for _, r := range relays {
		info := peer.AddrInfo{ID: host.FromKey(r.Key)}
		for _, a := range r.Addrs {
			if addr, err := manet.FromNetAddr(net.TCPAddrFromAddrPort(a)); err == nil { // ParseAddr has read it
				info.Addrs = append(info.Addrs, addr)
			}
		}
		infos = append(infos, info)
	}
	return infos
}

// fromRelay gets the indexes that img still lacks from one relay.
func (s *Swarm) fromRelay(ctx context.Context, img *image.Image, from peer.AddrInfo, own openings) error {
	c, err := s.pool.at(from)
	if err != nil {
		return err
	}
	defer s.pool.put(c)
	connect, stop := context.WithTimeout(ctx, connectRelay)
	defer stop()
	if err := c.Ready(connect); err != nil {
		return err
	}
	for i := range img.Layers {
		l := &img.Layers[i]
		if l.IndexSize == 0 {
			continue
		}
		got, err := c.FetchIndexes(ctx, image.Request{Ref: img.Ref, Manifest: img.Manifest, Only: []blockdev.Digest{l.DiffID}, Stored: true, Admit: exactly(l)})
		if err != nil {
			return err
		}
		if len(got.Layers) != 1 || int64(len(got.Layers[0].Index)) != l.IndexSize || blockdev.Sum(got.Layers[0].Index) != l.IndexDigest {
			return fmt.Errorf("the answer is not the index of diff %s: %w", l.DiffID, blockdev.ErrCorrupt)
		}
		l.Index, l.IndexSize = got.Layers[0].Index, 0
		s.metrics.indexes.Add(float64(len(l.Index)))
		s.opened.set(own, l.DiffID, l.Index)
	}
	return nil
}
