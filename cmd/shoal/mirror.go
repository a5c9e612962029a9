package main

import (
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/mirror"
	"github.com/shoalfs/shoal/internal/registry/credentials"
)

// newMirror makes the registry mirror that the config asks for, and what listens for
// it. The socket is kept, so that nobody else can have the port between two
// processes, and be told what containerd tells a mirror.
func newMirror(c *config.Node, up upstream, opener mirror.Opener, keychain *credentials.DockerConfig, store *fdstore.Store, log *slog.Logger, metrics prometheus.Registerer) (http.Handler, func() (net.Listener, error), error) {
	cfg := mirror.Config{Source: up, Opener: opener, Remote: remoteSupernode(c), Address: c.MirrorAddress, Log: log, Registerer: metrics}
	if c.NodeCredentialsForPulls {
		cfg.NodeCredentials = keychain
		log.Warn("node_credentials_for_pulls is true: every container on this machine may run every image that the credentials in docker_config open, without a pull secret of its own")
	}
	h, err := mirror.New(cfg)
	if err != nil || c.MirrorAddress == "" {
		return h, nil, err
	}
	listen := func() (net.Listener, error) { return listenKept(store, keptMirror, tcpSocket(c.MirrorAddress), log) }
	if c.MirrorPlainHTTP {
		log.Warn("mirror_plain_http is true: if another process takes the mirror's port while this daemon does not run, that process gets containerd's pull secrets")
		return h, listen, nil
	}
	ca, err := mirror.OpenAuthority(c.Root, c.MirrorAddress, log)
	if err != nil {
		return nil, nil, err
	}
	return h, func() (net.Listener, error) {
		ln, err := listen()
		if err != nil {
			return nil, err
		}
		return tls.NewListener(ln, ca.TLS()), nil
	}, nil
}

// remoteSupernode says whether a supernode is on another machine.
func remoteSupernode(c *config.Node) bool {
	for _, s := range c.Supernodes {
		_, addr, _ := strings.Cut(s, "@")
		host, _, err := net.SplitHostPort(addr)
		if ip := net.ParseIP(host); err != nil || host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return true
		}
	}
	return false
}
