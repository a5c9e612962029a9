package node

import (
	"context"
	"crypto/tls"
	"net"
	"strings"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/mirror"
)

// openMirror makes the registry mirror that the config asks for. Its socket is kept, so
// that nobody else can have the port between two processes, and be told what containerd
// tells a mirror.
func (d *Daemon) openMirror(context.Context) (err error) {
	cfg := mirror.Config{
		Source: d.up.source, Opener: d.images, Remote: elsewhere(d.cfg.Node), Address: d.cfg.MirrorAddress,
		Log: d.log, Registerer: d.registry,
	}
	if d.cfg.NodeCredentialsForPulls {
		cfg.NodeCredentials = d.keychain
		d.log.Warn("node_credentials_for_pulls is true: every container on this machine may run every image that the credentials in docker_config open, without a pull secret of its own")
	}
	if d.mirror, err = mirror.New(cfg); err != nil || d.cfg.MirrorAddress == "" {
		return err
	}
	listen := func() (net.Listener, error) {
		return listenKept(d.cfg.Store, keptMirror, tcpSocket(d.cfg.MirrorAddress), d.log)
	}
	if d.cfg.MirrorPlainHTTP {
		d.log.Warn("mirror_plain_http is true: if another process takes the mirror's port while this daemon does not run, that process gets containerd's pull secrets")
		d.listenMirror = listen
		return nil
	}
	ca, err := mirror.OpenAuthority(d.cfg.Root, d.cfg.MirrorAddress, d.log)
	if err != nil {
		return err
	}
	d.listenMirror = func() (net.Listener, error) {
		ln, err := listen()
		if err != nil {
			return nil, err
		}
		return tls.NewListener(ln, ca.TLS()), nil
	}
	return nil
}

// elsewhere says whether a supernode is on another machine.
func elsewhere(c *config.Node) bool {
	for _, s := range c.Supernodes {
		_, addr, _ := strings.Cut(s, "@")
		host, _, err := net.SplitHostPort(addr)
		if ip := net.ParseIP(host); err != nil || host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return true
		}
	}
	return false
}
