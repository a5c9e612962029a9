package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"sync"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// membership is a node's host, and what it knows of its supernodes and groups.
type membership struct {
	host       libp2phost.Host
	node       *members.Node
	supernodes []peer.AddrInfo // at its start

	listening sync.WaitGroup // ends with stop
	stop      context.CancelFunc
}

// openMembership makes a node's host and joins the supernodes in its config.
func openMembership(ctx context.Context, c *config.Node, ports *daemon.Ports, log *slog.Logger, reg prometheus.Registerer) (*membership, error) {
	token := func() (string, error) {
		list, err := members.ReadTokens(c.TokenFile)
		if errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("token_file: %w: copy the supernode's token there (its log names the file)", err)
		}
		if err != nil {
			return "", fmt.Errorf("token_file: %w", err)
		}
		return list[0], nil
	}
	// A token that is missing now is no reason not to serve what is here: it is
	// looked for again, and the log says so.
	m := &membership{}
	var err error
	if m.supernodes, err = parseSupernodes(c.Supernodes); err != nil {
		return nil, err
	}
	key, err := host.LoadIdentity(filepath.Join(c.Root, "identity"))
	if err != nil {
		return nil, err
	}
	announce, err := c.Announced()
	if err != nil {
		return nil, err
	}
	m.node, err = members.New(members.Config{
		Announce:   announce,
		Supernodes: m.supernodes, Token: token, Zone: c.Zone, Rack: c.Rack, MaxUpload: int64(c.MaxUpload), Log: log, Registerer: reg,
	})
	if err != nil {
		return nil, err
	}
	m.host, err = host.New(host.Config{Key: key, Guard: m.node, UserAgent: "shoal/" + version})
	if err != nil {
		return nil, errors.Join(err, m.node.Close())
	}
	// Before it joins, which is when others are told of its addresses.
	m.listen(ctx, ports, c.Listen)
	if err := m.node.Start(m.host); err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

// listen has the host listen for other nodes, now or as soon as it can.
func (m *membership) listen(ctx context.Context, ports *daemon.Ports, addrs []string) {
	ctx, m.stop = context.WithCancel(ctx)
	for _, addr := range addrs {
		port := ports.Open("listen", addr, func() (net.Listener, error) { return nil, host.Listen(m.host, addr) })
		m.listening.Go(func() { _, _ = port.Listener(ctx) })
	}
}

func (m *membership) close() error {
	m.stop()
	m.listening.Wait()
	return errors.Join(m.node.Close(), m.host.Close())
}

// answered says why no supernode has let this node in since it started; m may be nil.
func (m *membership) answered() error {
	if m == nil {
		return nil
	}
	return m.node.Answered()
}

// watch has others told which images are complete here; m may be nil.
func (m *membership) watch(vols *volume.Manager) {
	if m == nil {
		return
	}
	m.node.Watch(func(diff blockdev.Digest) bool {
		s, ok := vols.Stat(diff)
		return ok && s.Complete
	})
}

// groups is what the catalogue tells of its images; nil where there are no
// groups.
func (m *membership) groups() images.Groups {
	if m == nil {
		return nil
	}
	return groups{m.node}
}

// enter is swarm.Config.Enter.
func (m *membership) enter(img *image.Image, at []peer.AddrInfo) func() {
	im := members.Image{Manifest: img.Manifest, Grant: img.Grant}
	for _, l := range img.Layers {
		im.Diffs = append(im.Diffs, l.DiffID)
	}
	return m.node.Enter(im, at)
}

type groups struct{ node *members.Node }

// Join implements images.Groups.
func (g groups) Join(manifest blockdev.Digest, diffs []blockdev.Digest, grant []byte) {
	g.node.Join(members.Image{Manifest: manifest, Diffs: diffs, Grant: grant})
}

// Leave implements images.Groups.
func (g groups) Leave(manifest blockdev.Digest) { g.node.Leave(manifest) }
