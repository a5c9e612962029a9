package exchange

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/multiformats/go-multistream"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Options change how a Client behaves. The zero value of each field stands for
// its default.
type Options struct {
	// Name is what errors call the server: "supernode" unless set.
	Name string
	// Demand, Startup, Prefetch, Images and Documents are how many requests of each
	// kind may be under way: 64, 8, 2, 8, 16. What is above waits here. More than
	// the server's limits per peer gives busy answers.
	Demand, Startup, Prefetch, Images, Documents int
	// Forwards is how many prefetches on behalf of other nodes may be under way:
	// 8. They do not count with those of this machine, nor wait for the window:
	// a node that let the one wait for the other could wait for itself.
	Forwards int
	// Peer: the server gets chunks from others as this machine does, maybe from
	// this machine. So that no caller waits for itself, prefetches
	// beyond their limit fail with wire.ErrBusy and do not wait, neither for each
	// other nor for the window: the caller bounds them. It is one of many: only the
	// first attempt to connect is waited for.
	Peer bool
	Intake
	// Via is what Fetch asks by; zero: as of a supernode.
	Via Via
	// Raw asks for chunks without compression.
	Raw bool
	// DemandTimeout and PrefetchTimeout are how long the server may take for
	// one chunk (15 s, 60 s); ImageTimeout how long it may be silent while it
	// prepares an image or a manifest (20 s). The context bounds the whole.
	DemandTimeout, PrefetchTimeout, ImageTimeout time.Duration
	// FirstSign is how long the server may be silent before its first sign that it is at
	// work on an image or a manifest; 0: ImageTimeout. A server gives one within half a
	// second.
	FirstSign time.Duration
	// DialTimeout bounds one attempt to connect (3 s); after failures the next
	// one comes after 50 ms, doubling up to MaxBackoff (2 s).
	DialTimeout, MaxBackoff time.Duration
	// Restart is how long requests for images, documents and chunks that a read waits
	// for wait for a server that was connected a moment ago: one that is being restarted;
	// if that is longer ago they wait for one more attempt to connect. 0: they fail at
	// once, as when there is another server to ask.
	Restart time.Duration
	// Away is after what time without a connection requests for chunks do not wait for
	// another attempt to connect any more; 0: they always wait for one that is under way.
	Away time.Duration
	// Patient: images and documents for which the server has too much to do are asked
	// for again until the context ends. A rollout has all nodes ask one supernode at
	// once, and what it says after a while is better than what a registry would have
	// to bear.
	Patient bool
	// Only, if not nil, says whether there is no other server to ask now. If there is, Restart
	// and Patient do not count.
	Only func() bool
	// Ready, if not nil, returns nil once the server, which is connected, has let
	// this machine in. Requests wait for it.
	Ready func(context.Context) error
	Log   *slog.Logger // nil: no log
}

// Intake is what all chunks that come to one machine go through: its clients share it.
type Intake struct {
	// Window bounds the bytes that prefetches have under way; nil: each client gets its
	// own.
	Window *LinkWindow
	// Download is the budget for chunks; nil: no limit.
	Download *pace.Pacer
	// Frames, if not nil, is given the chunks that come compressed, once Deliver
	// has returned nil for them.
	Frames *Frames
}

func (o *Options) setDefaults() {
	defaults.Set(&o.Name, "supernode")
	defaults.Positive(&o.Demand, 64)
	defaults.Positive(&o.Startup, 8)
	defaults.Positive(&o.Prefetch, 2)
	defaults.Positive(&o.Images, 8)
	defaults.Positive(&o.Documents, 16)
	defaults.Positive(&o.Forwards, 8)
	defaults.Positive(&o.DemandTimeout, 15*time.Second)
	defaults.Positive(&o.PrefetchTimeout, 60*time.Second)
	defaults.Positive(&o.ImageTimeout, 20*time.Second)
	defaults.Positive(&o.FirstSign, o.ImageTimeout)
	defaults.Positive(&o.DialTimeout, 3*time.Second)
	defaults.Positive(&o.MaxBackoff, 2*time.Second)
	if o.Window == nil {
		o.Window = NewLinkWindow()
	}
	defaults.Log(&o.Log)
}

// Client gets chunks, indexes and manifests from one server. It keeps one connection, made
// when the Client is and again whenever it is lost. It may be used from several
// goroutines.
type Client struct {
	opts    Options
	name    string // for errors
	keeper  *keeper
	demand  *lane
	startup *lane
	pre     *lane
	forward *lane
	images  *lane
	docs    *lane
	reports *lane
	window  *LinkWindow
	// starting is the window of chunks by a startup profile. It is bounded, but not
	// closed by demand reads: a container that starts is about to need these as well.
	starting *LinkWindow
	zstd     decoder
	buffers  Buffers
}

var (
	_ blockdev.Source      = (*Client)(nil)
	_ image.Source         = (*Client)(nil)
	_ blockdev.ProfileSink = (*Client)(nil)
	_ image.DocumentSource = (*Client)(nil)
)

// NewClient returns a Client of the server at info (host.ParseAddr reads one
// from a config) and begins to connect. Close it before h.
func NewClient(h libp2phost.Host, info peer.AddrInfo, opts Options) (*Client, error) {
	opts.setDefaults()
	if info.ID == "" || len(info.Addrs) == 0 {
		return nil, fmt.Errorf("%s: no peer ID or no address", opts.Name)
	}
	if info.ID == h.ID() {
		return nil, fmt.Errorf("%s %s: that is this machine's own identity", opts.Name, info.ID)
	}
	c := &Client{opts: opts, name: opts.Name + " " + info.ID.String(), window: opts.Window, starting: NewLinkWindow()}
	c.demand = newLane(h, info.ID, ChunkProtocol, opts.Demand)
	c.startup = newLane(h, info.ID, ChunkProtocol, opts.Startup)
	c.pre = newLane(h, info.ID, ChunkProtocol, opts.Prefetch)
	c.forward = newLane(h, info.ID, ChunkProtocol, opts.Forwards)
	c.images = newLane(h, info.ID, ImageProtocol, opts.Images)
	c.docs = newLane(h, info.ID, DocumentProtocol, opts.Documents)
	c.reports = newLane(h, info.ID, ProfileProtocol, 1)
	c.keeper = newKeeper(h, info, opts, c.expire)
	return c, nil
}

// Close ends all requests and the connection's upkeep. The connection itself is
// the host's.
func (c *Client) Close() error {
	c.keeper.close()
	for _, l := range c.lanes() {
		l.close()
	}
	return nil
}

// Status says whether the server can be reached now, and if not why. The error
// wraps blockdev.ErrUnavailable.
func (c *Client) Status() error { return c.explain(c.keeper.status()) }

// Ready waits until the server is connected, or an attempt to connect has failed. The
// error wraps blockdev.ErrUnavailable, or is the context's.
func (c *Client) Ready(ctx context.Context) error { return c.explain(c.ready(ctx)) }

// ready waits until the server is connected and has let this machine in.
func (c *Client) ready(ctx context.Context) error {
	if err := c.keeper.ready(ctx); err != nil || c.opts.Ready == nil {
		return err
	}
	return c.opts.Ready(ctx)
}

// Gone returns for how long there has been no connection to the server, or since the
// Client was made; 0: there is one.
func (c *Client) Gone() time.Duration { return c.keeper.gone() }

// readyForChunks is ready for a request of this priority. One that somebody waits for
// has the next attempt to connect come soon; what it costs to wait for a server that does
// not come back is paid once.
func (c *Client) readyForChunks(ctx context.Context, prio blockdev.Priority) error {
	if c.opts.Away > 0 && c.keeper.gone() > c.opts.Away {
		return c.keeper.status()
	}
	if prio == blockdev.Prefetch || c.opts.Peer {
		return c.ready(ctx)
	}
	err := c.readyAgain(ctx)
	if err != nil && c.opts.Away > 0 {
		c.keeper.hurry()
	}
	return err
}

// restartLook is how often a request looks whether a server is back.
const restartLook = 10 * time.Millisecond

// readyAgain is ready for a server that may be restarting: it waits until
// Options.Restart after the connection was lost, and for one attempt at least.
func (c *Client) readyAgain(ctx context.Context) error {
	for attempts := 0; ; attempts++ {
		err := c.ready(ctx)
		if err == nil || ctx.Err() != nil || c.keeper.ctx.Err() != nil || c.opts.Restart == 0 || !c.only() ||
			attempts > 0 && time.Since(c.keeper.lostAt()) >= c.opts.Restart {
			return err
		}
		c.keeper.hurry()
		select {
		case <-time.After(restartLook):
		case <-ctx.Done():
		}
	}
}

// only says whether there is no other server to ask.
func (c *Client) only() bool { return c.opts.Only == nil || c.opts.Only() }

// Server returns the peer that the client was made for.
func (c *Client) Server() peer.AddrInfo { return c.keeper.info }

// Peer returns the server's peer ID.
func (c *Client) Peer() peer.ID { return c.keeper.info.ID }

func (c *Client) lanes() []*lane {
	return []*lane{c.demand, c.startup, c.pre, c.forward, c.images, c.docs, c.reports}
}

func (c *Client) expire(before time.Time) {
	for _, l := range c.lanes() {
		l.expire(before)
	}
}

// explain puts the server's name in front of err.
func (c *Client) explain(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", c.name, err)
}

// broken says whether a stream failed in a way that another stream may not.
func (c *Client) broken(ctx context.Context, err error) bool {
	var remote *wire.RemoteError
	var unknown multistream.ErrNotSupported[protocol.ID]
	return ctx.Err() == nil && c.keeper.ctx.Err() == nil && !isTimeout(err) &&
		!errors.As(err, &remote) && !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, unknown)
}

// cause turns the failure of a stream into what callers act upon: the context's
// error, ErrCorrupt, or ErrUnavailable.
func (c *Client) cause(ctx context.Context, err error, waited time.Duration) error {
	var remote *wire.RemoteError
	var unknown multistream.ErrNotSupported[protocol.ID]
	switch {
	case ctx.Err() != nil:
		return contextError(ctx)
	case errors.As(err, &remote), errors.Is(err, blockdev.ErrCorrupt), errors.Is(err, blockdev.ErrUnavailable):
		return err
	case errors.Is(err, unknown):
		return fmt.Errorf("%w: it does not speak this version's protocol (%w): the other side runs another version of shoal, or does not serve this", blockdev.ErrUnavailable, err)
	case isTimeout(err):
		return fmt.Errorf("%w: no progress for %s", blockdev.ErrUnavailable, waited)
	case c.keeper.ctx.Err() != nil:
		return fmt.Errorf("%w: the client is closed", blockdev.ErrUnavailable)
	}
	return fmt.Errorf("%w: the stream broke: %w", blockdev.ErrUnavailable, err)
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// contextError is ctx's error, with its cause where that says more.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if cause == nil || errors.Is(cause, err) {
		return err
	}
	return fmt.Errorf("%w: %w", err, cause)
}
