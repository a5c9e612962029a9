package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	firstRebind = time.Second
	lastRebind  = 30 * time.Second
)

// Ports are what a daemon listens on beside what it is there for. One that cannot be
// bound is no reason to end: it is logged and tried again, and a metric says so.
type Ports struct {
	log     *slog.Logger
	unbound *prometheus.GaugeVec
}

// NewPorts registers the metric.
func NewPorts(log *slog.Logger, reg prometheus.Registerer) (*Ports, error) {
	p := &Ports{log: log, unbound: prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "shoal_ports_unbound", Help: "Addresses of a config key that the daemon cannot listen on; the daemon tries again.",
	}, []string{"key"})}
	return p, reg.Register(p.unbound)
}

// Port is one address of one key of the config.
type Port struct {
	ports     *Ports
	key, addr string
	listen    func() (net.Listener, error)

	failed string // the last error that was logged
	bound  bool
	ln     net.Listener
}

// Open tries for the first time, and returns the Port also if that fails.
func (p *Ports) Open(key, addr string, listen func() (net.Listener, error)) *Port {
	port := &Port{ports: p, key: key, addr: addr, listen: listen}
	port.try()
	return port
}

// try notes in the metric and, once for each cause, in the log how it went.
func (p *Port) try() {
	ln, err := p.listen()
	gauge := p.ports.unbound.WithLabelValues(p.key)
	switch {
	case err == nil:
		if p.failed != "" {
			gauge.Dec()
			p.ports.log.Info("listening, after an attempt that failed", "key", p.key, "address", p.addr)
		} else {
			gauge.Add(0) // so that there is a value
		}
		p.ln, p.bound, p.failed = ln, true, ""
	case p.failed != err.Error():
		if p.failed == "" {
			gauge.Inc()
		}
		p.failed = err.Error()
		p.ports.log.Error("cannot listen on an address; trying again, and everything else goes on", "key", p.key, "address", p.addr, "error", err)
	}
}

// Listener returns what listen gave, as soon as there is no error, or ctx's error.
// A listener is the caller's to close.
func (p *Port) Listener(ctx context.Context) (net.Listener, error) {
	for wait := firstRebind; !p.bound; wait = min(2*wait, lastRebind) {
		select {
		case <-time.After(wait):
			p.try()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	p.bound = false
	return p.ln, nil
}

// ServeHTTP answers on a port until ctx ends, however often it has to be bound. A
// client may take ten seconds for a request's header, and two minutes for the whole
// exchange.
func (p *Port) ServeHTTP(ctx context.Context, h http.Handler) {
	for {
		ln, err := p.Listener(ctx)
		if err != nil {
			return
		}
		srv := &http.Server{
			Handler: h, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: 2 * time.Minute, IdleTimeout: 2 * time.Minute,
			MaxHeaderBytes: 64 << 10, BaseContext: func(net.Listener) context.Context { return ctx },
		}
		stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
		err = srv.Serve(ln)
		stop()
		if ctx.Err() != nil {
			return
		}
		if !errors.Is(err, http.ErrServerClosed) {
			p.ports.log.Error("a port was lost; it is bound again", "key", p.key, "address", p.addr, "error", err)
		}
	}
}

// Serve answers on a TCP address, as soon as it can be bound, until stop is called or ctx
// ends. An empty address serves nothing.
func (p *Ports) Serve(ctx context.Context, key, addr string, h http.Handler) (stop func()) {
	if addr == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	port := p.Open(key, addr, TCP(addr))
	done := make(chan struct{})
	go func() {
		defer close(done)
		port.ServeHTTP(ctx, h)
	}()
	return func() {
		cancel()
		<-done
	}
}

// TCP listens on addr, for Open.
func TCP(addr string) func() (net.Listener, error) {
	return func() (net.Listener, error) { return net.Listen("tcp", addr) }
}
