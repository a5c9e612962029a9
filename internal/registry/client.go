package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	ctrlog "github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/blockdev/turns"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/lru"
	"github.com/shoalfs/shoal/internal/pattern"
	"github.com/shoalfs/shoal/internal/quiet"
)

// Config configures a Client. The zero value works, without a cache.
type Config struct {
	// HostDirs are directories in the form of containerd's certs.d
	// (<dir>/<host>/hosts.toml); the first that knows a host counts. They are
	// read again after HostsTTL.
	HostDirs []string
	// CacheDir keeps manifests and configs; empty: no cache.
	CacheDir string
	// CacheBytes bounds CacheDir; 0: 256 MiB.
	CacheBytes int64
	// DocumentBytes bounds the bytes of manifests and configs that are being read from
	// registries, of which one host has half at most; 0: 256 MiB. Beyond it, requests fail
	// with blockdev.ErrUnavailable.
	DocumentBytes int64
	// TagTTL is how long a tag is believed without asking; 0: one minute.
	TagTTL time.Duration
	// HostsTTL is how long hosts.toml files, connections and tokens are kept;
	// 0: one minute.
	HostsTTL time.Duration
	// Timeout is for one question (manifest, config, tag), with its repetitions;
	// 0: 30 s. Layers have none, only Stall.
	Timeout time.Duration
	// Stall is how long a connection may bring no byte; 0: 30 s.
	Stall time.Duration
	// Allowed are the repositories that may be asked for, also where a mirror has them;
	// nil: all.
	Allowed *pattern.Repositories
	// Log gets what goes wrong and is survived; nil: nothing is logged.
	Log *slog.Logger
	// Received, if set, is called for every n bytes of answers as they arrive. It
	// is called from many goroutines.
	Received func(n int64)
	// Download is the budget for layers, shared among registries in turns; nil: no
	// limit. Manifests, tokens and questions do not wait for it.
	Download *pace.Pacer
}

// Client asks registries. It is safe for concurrent use.
type Client struct {
	cfg     Config
	log     *slog.Logger
	cache   *cache // nil: none
	quiet   *logrus.Entry
	asking  *flight.Group[string, *question]
	reading *turns.Turns // Config.DocumentBytes, by host
	allowed atomic.Pointer[pattern.Repositories]
	said    quiet.Quiet // what the log has said of requests that nodes may repeat at will

	mu       sync.Mutex
	hosts    *lru.Map[string, *hostSet] // by Reference.Host
	sessions *lru.Map[sessionKey, *session]
	down     *lru.Map[asker, time.Time] // not to be asked for fresher tags before
	told     *lru.Map[string, struct{}] // hosts of which the log says that they may not be asked
	closed   bool
}

type sessionKey struct{ host, cred string }

// session is what one credential has at one registry: hosts with an authorizer,
// which keeps tokens.
type session struct {
	hosts []docker.RegistryHost
	until time.Time
	set   *hostSet
	loops int // how many of the set were left out
}

// stale says that a host was asked that turned out to lead back here.
func (s *session) stale() bool { return s.set.looping() > s.loops }

const (
	maxSessions = 512
	maxDown     = 1 << 14
)

func (c *Config) setDefaults() error {
	defaults.Set(&c.TagTTL, time.Minute)
	defaults.Set(&c.HostsTTL, time.Minute)
	defaults.Set(&c.Timeout, 30*time.Second)
	defaults.Set(&c.Stall, 30*time.Second)
	defaults.Set(&c.CacheBytes, 256<<20)
	defaults.Positive(&c.DocumentBytes, 256<<20)
	defaults.Log(&c.Log)
	if min(c.TagTTL, c.HostsTTL, c.Timeout, c.Stall) < 0 {
		return errors.New("registry: a duration is negative")
	}
	return nil
}

// New returns a client.
func New(cfg Config) (*Client, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg, log: cfg.Log, asking: flight.New[string, *question](flight.Policy{Outlives: true}, errClosed),
		reading:  turns.New(cfg.DocumentBytes, 0),
		hosts:    lru.NewEvict(maxSessions, func(_ string, set *hostSet) { set.closeIdle() }),
		sessions: lru.New[sessionKey, *session](maxSessions), down: lru.New[asker, time.Time](maxDown), told: lru.New[string, struct{}](maxSessions)}
	c.allowed.Store(cfg.Allowed)
	// containerd logs URLs with their queries, through logrus and by default to
	// stderr. Only what it says about hosts.toml files is of use here.
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.ErrorLevel)
	l.AddHook(hook{c.log})
	c.quiet = logrus.NewEntry(l)
	if cfg.CacheDir != "" {
		var err error
		if c.cache, err = openCache(cfg.CacheDir, cfg.CacheBytes); err != nil {
			return nil, fmt.Errorf("registry: cache of manifests: %w", err)
		}
	}
	return c, nil
}

// Close ends questions about manifests, configs and tags, and closes idle
// connections. Other requests that run are the callers' to end.
func (c *Client) Close() error {
	c.asking.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.hosts.Purge()
	c.sessions.Purge()
	return nil
}

// hook passes containerd's error messages on.
type hook struct{ log *slog.Logger }

// Levels implements logrus.Hook.
func (hook) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

// Fire implements logrus.Hook.
func (h hook) Fire(e *logrus.Entry) error {
	err, _ := e.Data[logrus.ErrorKey].(error)
	text := ""
	if err != nil {
		text = scrub(err.Error())
	}
	h.log.Error(scrub(e.Message), "error", text)
	return nil
}

// wrap puts a transport in front of a client that containerd has configured.
func (c *Client) wrap(hc *http.Client, set *hostSet) {
	if _, done := hc.Transport.(*transport); done {
		return
	}
	if tr, ok := hc.Transport.(*http.Transport); ok {
		set.pools = append(set.pools, tr)
		tr.MaxIdleConnsPerHost = 8
		tr.DisableCompression = true
		tr.MaxResponseHeaderBytes = 256 << 10
		tr.OnProxyConnectResponse = tunnel
	}
	hc.Transport = &transport{base: hc.Transport, stall: c.cfg.Stall, count: c.cfg.Received, loop: set.loop, plain: set.setPlain}
}

// session returns hosts and tokens for a credential at a registry, as far as they may
// be asked for the repository. With renew, what is kept is thrown away: containerd's
// authorizer keeps a failed token request for ever.
func (c *Client) session(ctx context.Context, ref Reference, cred image.Credential, renew bool) (*session, bool, error) {
	if err := c.Allowed(ref); err != nil {
		return nil, false, err
	}
	s, fresh, err := c.hostSession(ctx, ref.Host, cred, renew)
	if err != nil {
		return nil, false, err
	}
	s, err = c.permitted(s, ref)
	return s, fresh, err
}

// hostSession is session for all repositories of a registry.
func (c *Client) hostSession(ctx context.Context, host string, cred image.Credential, renew bool) (_ *session, fresh bool, _ error) {
	now := time.Now()
	key := sessionKey{host, CredentialHash(cred)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, _ := c.sessions.Get(key); s != nil && now.Before(s.until) && !renew && !s.stale() {
		return s, false, nil
	}
	if c.closed {
		return nil, false, errClosed
	}
	set, _ := c.hosts.Get(host)
	if set == nil || !now.Before(set.until) {
		next := &hostSet{until: now.Add(c.cfg.HostsTTL), heads: make(chan struct{}, maxHeads)}
		hosts, err := config.ConfigureHosts(ctrlog.WithLogger(ctx, c.quiet), config.HostOptions{
			HostDir:      c.hostDir,
			UpdateClient: func(hc *http.Client) error { c.wrap(hc, next); return nil },
		})(host)
		if err != nil {
			return nil, false, &Error{Host: host, answered: true, kind: blockdev.ErrUnavailable, text: "its hosts.toml directory cannot be used: " + scrub(err.Error())}
		}
		if len(hosts) == 0 {
			return nil, false, &Error{Host: host, answered: true, kind: blockdev.ErrUnavailable, text: "its hosts.toml names no server"}
		}
		next.hosts = hosts
		set = next
		c.hosts.Remove(host)
		c.hosts.Add(host, set)
	}
	server := set.hosts[len(set.hosts)-1].Host
	hosts, loops := set.usable()
	s := &session{until: set.until, set: set, loops: loops}
	for _, h := range hosts {
		tokens := *h.Client
		tokens.CheckRedirect = redirects{plain: set.isPlain}.check
		a := authorizer{docker.NewDockerAuthorizer(docker.WithAuthClient(&tokens), docker.WithAuthHeader(h.Header),
			docker.WithAuthCreds(credentialFor(cred, host, server))), redirects{plain: set.isPlain}}
		hc := *h.Client
		hc.CheckRedirect = redirects{plain: set.isPlain, authorize: a.Authorize}.check
		h.Client, h.Authorizer = &hc, a
		s.hosts = append(s.hosts, h)
	}
	c.sessions.Add(key, s)
	return s, true, nil
}

func (s *session) having(caps docker.HostCapabilities) (hosts []docker.RegistryHost) {
	for _, h := range s.hosts {
		if h.Capabilities.Has(caps) {
			hosts = append(hosts, h)
		}
	}
	return hosts
}

// do runs one question with a session: again with a fresh one where the
// answer may have been a kept one, and a few times where the registry was not
// available and did not ask to be left alone.
func (c *Client) do(ctx context.Context, ref Reference, name string, cred image.Credential, ask func(context.Context, *session) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.Timeout, errSlow)
	defer cancel()
	ctx = ctrlog.WithLogger(ctx, c.quiet)
	renew := false
	for try := 0; ; try++ {
		s, fresh, err := c.session(ctx, ref, cred, renew)
		if err != nil {
			return mapError(ctx, name, err)
		}
		start := time.Now()
		raw := ask(ctx, s)
		if raw == nil {
			return nil
		}
		err = mapError(ctx, name, raw)
		renew = true
		// A request of another caller that shares the session may have been
		// cancelled while it fetched our token.
		foreign := errors.Is(raw, context.Canceled) && ctx.Err() == nil
		switch {
		case ctx.Err() != nil:
			return err
		case try == 0 && !fresh && (foreign || errors.Is(err, blockdev.ErrUnauthorized)):
			continue
		case !errors.Is(err, blockdev.ErrUnavailable) || try >= 2 ||
			time.Since(start) > c.cfg.Timeout/4 || !pause(ctx, err, try):
			c.forget(ref.Host, cred)
			return err
		}
	}
}

// pause waits before a repetition; false if that is not worth while.
func pause(ctx context.Context, err error, try int) bool {
	wait := 100 * time.Millisecond << (2 * try)
	var e *Error
	if errors.As(err, &e) && e.after > 0 {
		if e.after > 2*time.Second {
			return false
		}
		wait = e.after
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(wait):
		return true
	}
}

// forget drops the tokens of a session.
func (c *Client) forget(host string, cred image.Credential) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sessions.Remove(sessionKey{host, CredentialHash(cred)})
}

// downTime is how long a registry that had no answer is not asked what a tag names now,
// where the last answer is known.
const downTime = 10 * time.Second

// asker is a host or a repository, and the hash of the credential with which it was
// asked: what one credential is refused, another one may get.
type asker struct{ of, cred string }

func (c *Client) isDown(ref Reference, cred image.Credential) bool {
	hash := CredentialHash(cred)
	c.mu.Lock()
	defer c.mu.Unlock()
	host, _ := c.down.Get(asker{ref.Host, hash})
	repository, _ := c.down.Get(asker{ref.Name(), hash})
	now := time.Now()
	return now.Before(host) || now.Before(repository)
}

// setDown notes that ref's registry had no good answer. If it had one that is of no use, then
// that is about the repository, and says nothing about the others.
func (c *Client) setDown(ref Reference, cred image.Credential, err error) {
	key := asker{ref.Host, CredentialHash(cred)}
	if e := (*Error)(nil); errors.As(err, &e) && (e.Status != 0 || e.answered) {
		key.of = ref.Name()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down.Add(key, time.Now().Add(downTime))
}
