package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/lru"
	"github.com/shoalfs/shoal/internal/quiet"
	"github.com/shoalfs/shoal/internal/registry"
)

// Checker asks a registry whether a credential may pull; nil means yes.
type Checker interface {
	Check(ctx context.Context, ref string, manifest blockdev.Digest, cred image.Credential) error
}

const (
	// File is the name of the access records in Config.Dir, and Lost is what a damaged one
	// costs.
	File = "access.db"
	Lost = "while a registry is down, only nodes that got access since then have it"
)

const (
	// negativeTTL is how long a registry's "no" to anonymous access is believed.
	// It only saves requests: a node with a credential asks with it anyway.
	negativeTTL = time.Minute
	// graceWait is how long a registry may take to answer if there is the grace
	// to fall back on; downWait is the same for one that has just left another
	// question without an answer. What comes later counts from then on.
	graceWait = 3 * time.Second
	downWait  = 500 * time.Millisecond
	// downTTL is how long a registry is not asked about a repository again for which it has
	// just had no good answer, and how long downWait counts for its other repositories.
	downTTL = 10 * time.Second
	// maxAnswers bounds the answers kept in memory.
	maxAnswers = 1 << 16
)

// Access is the record of answers. All methods may be called from any goroutine.
type Access struct {
	cfg        Config
	db         *bbolt.DB
	asking     *flight.Group[string, *question] // checks, which outlive the request that began them
	stop, done chan struct{}                    // of flush
	quiet      quiet.Quiet

	mu      sync.Mutex
	failed  error                      // of the last write
	yes     *lru.Map[grant, time.Time] // until when
	no      *lru.Map[string, time.Time]
	down    *lru.Map[string, time.Time] // repository -> not asked before; registry host -> not waited for
	limited *lru.Map[string, time.Time] // public repository -> not asked before
	peers   *seen                       // accesses with a credential
	public  *seen                       // those of everybody

	salt      []byte
	stretched *lru.Map[string, string] // what lasts of a credential, hashed slowly, by its fast hash
}

var (
	// errClosed is the end of questions that run when Close is called.
	errClosed = fmt.Errorf("no registry is asked any more: %w", blockdev.ErrUnavailable)
	// errLate is for a peer that has the grace to fall back on. The question goes on.
	errLate = fmt.Errorf("the registry has not answered yet: %w", blockdev.ErrUnavailable)
)

// question is one that a registry is being asked; access.mu guards it.
type question struct {
	err  error       // what the registry said, unless that is yes
	late []accessKey // of peers that were not kept waiting
}

// grant is a repository and what may read it: the hash of a credential, or "" for
// everybody.
type grant struct{ repo, cred string }

// Config says how long a registry's word counts. All of it is required but Now.
type Config struct {
	// Dir has the access records.
	Dir string
	// Registry is asked.
	Registry Checker
	// TTL is how long its yes is believed, and Grace how long an older one counts while the
	// registry is down.
	TTL, Grace time.Duration
	Log        *slog.Logger
	// Now is the time; tests give their own.
	Now func() time.Time
}

// Open opens the access records, or begins them again if they are damaged.
func Open(cfg Config) (*Access, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	file := filepath.Join(cfg.Dir, File)
	if err := boltcheck.File(file, nil); errors.Is(err, blockdev.ErrCorrupt) {
		aside, aerr := boltcheck.SetAside(file)
		if aerr != nil {
			return nil, aerr
		}
		cfg.Log.Error("the access records are damaged and were set aside; "+Lost, "aside", aside, "error", err)
	}
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		return nil, fmt.Errorf("%s (does another supernode use the directory?): %w", file, err)
	}
	a := &Access{cfg: cfg, db: db, stop: make(chan struct{}), done: make(chan struct{}),
		asking: flight.New[string, *question](flight.Policy{Outlives: true}, errClosed),
		yes:    lru.New[grant, time.Time](maxAnswers), no: lru.New[string, time.Time](maxAnswers),
		down: lru.New[string, time.Time](maxAnswers), limited: lru.New[string, time.Time](maxAnswers),
		peers: newSeen(maxAccesses, cfg), public: newSeen(maxPublic, cfg), stretched: lru.New[string, string](maxStretched)}
	if err := a.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", file, err), db.Close())
	}
	go a.flush()
	return a, nil
}

// Close ends running checks and writes what is pending.
func (a *Access) Close() error {
	close(a.stop)
	<-a.done
	a.asking.Close()
	return errors.Join(a.write(), a.db.Close())
}

// Healthy says whether the access records can be written: whether the disk
// takes writes.
func (a *Access) Healthy() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failed
}

// Verdict is a yes.
type Verdict struct {
	// Public: no credential is needed.
	Public bool
	// Stale: the registry could not be asked; an earlier yes counts.
	Stale bool
}

// Try asks a registry with a credential and, if anybody may read the repository and the
// registry refuses, without one: a credential that has expired keeps no peer from what is
// public.
func (v Verdict) Try(c image.Credential, ask func(image.Credential) error) error {
	err := ask(c)
	if v.Public && c != (image.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
		err = ask(image.Credential{})
	}
	return err
}

// Allow says whether a peer may read the repository of req.Ref. No is an error:
// the registry's, or ErrUnavailable if it cannot be asked.
func (a *Access) Allow(ctx context.Context, peer string, ref registry.Reference, req image.Request) (Verdict, error) {
	repo := ref.Name()
	g := grant{repo, registry.CredentialHash(req.Credential)}
	withCred := g.cred != ""
	now := a.cfg.Now()
	a.mu.Lock()
	public := still(a.yes, grant{repo, ""}, now)
	everybody := a.public.before(publicKey(ref), now)
	limitedStill := still(a.limited, repo, now)
	a.mu.Unlock()
	switch {
	case public:
		return Verdict{Public: true}, nil
	case everybody && limitedStill:
		return Verdict{Public: true, Stale: true}, nil
	}
	mine := a.key(peer, ref, a.lasting(g.cred, req.Credential))
	a.mu.Lock()
	own := withCred && still(a.yes, g, now)
	notPublic := still(a.no, repo, now)
	before := withCred && a.peers.before(mine, now)
	isDown := still(a.down, repo, now)
	wait := graceWait
	if still(a.down, ref.Host, now) {
		wait = downWait
	}
	a.mu.Unlock()
	switch {
	case own:
		a.note(mine, now)
		return Verdict{}, nil
	case isDown && (before || everybody):
		return Verdict{Public: everybody, Stale: true}, nil
	}
	if before || everybody {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, wait, errLate)
		defer cancel()
	}

	err := fmt.Errorf("%s: the registry wants a credential, and the request has none: %w", req.Ref, blockdev.ErrUnauthorized)
	if !notPublic {
		if err = a.ask(ctx, grant{repo, ""}, ref, req, nil); err == nil {
			return Verdict{Public: true}, nil
		}
	}
	// A rate limit for those without a credential takes nothing from anybody, but
	// says nothing about a credential either.
	limited := registry.Limited(err)
	everybody = everybody && (limited || registry.Outage(err))
	// If the answer is late, then the credential is asked about as well, so that a no to it
	// counts once it is here.
	late := errors.Is(err, errLate) && before && !everybody
	if withCred && (errors.Is(err, blockdev.ErrUnauthorized) || errors.Is(err, blockdev.ErrNotFound) || limited || late) {
		if err = a.ask(ctx, g, ref, req, &mine); err == nil {
			a.note(mine, a.cfg.Now())
			return Verdict{}, nil
		}
		if errors.Is(err, blockdev.ErrUnauthorized) || errors.Is(err, blockdev.ErrNotFound) {
			a.revoke(mine)
			before = false
		}
	}
	switch out := registry.Outage(err); {
	case out && (before || everybody):
		a.setDown(ref, err)
		if others, say := a.quiet.Say("down", ref.Host, now); say {
			a.cfg.Log.Warn("the registry is down; access that it granted before counts", "image", req.Ref, "peer", peer, "error", err, "others", others)
		}
		return Verdict{Public: everybody, Stale: true}, nil
	case limited && everybody:
		a.leaveAlone(repo, err)
		return Verdict{Public: true, Stale: true}, nil
	}
	return Verdict{}, err
}

// leaveAlone has a public repository not asked about again while its registry limits
// requests.
func (a *Access) leaveAlone(repo string, err error) {
	wait := downTTL
	if e := (*registry.Error)(nil); errors.As(err, &e) {
		wait = max(wait, e.RetryAfter())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.limited.Add(repo, a.cfg.Now().Add(min(wait, a.cfg.TTL)))
}

// setDown keeps others from waiting for what a registry has just not answered. Other
// repositories of a registry that gave no answer at all are asked about nevertheless: what
// is wrong with one of them extends no access to another one.
func (a *Access) setDown(ref registry.Reference, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	until := a.cfg.Now().Add(downTTL)
	a.down.Add(ref.Name(), until)
	if e := (*registry.Error)(nil); !errors.As(err, &e) || e.Status == 0 {
		a.down.Add(ref.Host, until)
	}
}

// ask asks the registry, once for all callers that want to know the same at the same time.
// The question goes on when ctx ends; if the answer is no, mine is forgotten then.
func (a *Access) ask(ctx context.Context, g grant, ref registry.Reference, req image.Request, mine *accessKey) error {
	cred := req.Credential
	if g.cred == "" {
		cred = image.Credential{}
	}
	// The manifest belongs to the key: that one image is not there says nothing
	// about the next one.
	key := g.repo + "\x00" + g.cred + "\x00" + req.Ref + "\x00" + req.Manifest.Hex()
	f, err := a.asking.Join(key, func() (*question, flight.Work) {
		q := new(question)
		return q, func(ctx context.Context) error {
			if a.answered(g) { // since the caller looked
				return nil
			}
			err := a.cfg.Registry.Check(ctx, req.Ref, req.Manifest, cred)
			a.answer(q, g, ref, err)
			return err
		}
	})
	if err != nil {
		return fmt.Errorf("%s: %w", req.Ref, err)
	}
	defer f.Leave()
	select {
	case <-f.Done():
		if errors.Is(f.Err(), errClosed) {
			return fmt.Errorf("%s: %w", req.Ref, errClosed)
		}
		return f.Err()
	case <-ctx.Done():
		a.tooLate(f.State, mine)
		why := ctx.Err()
		if errors.Is(context.Cause(ctx), errLate) {
			why = errLate
		}
		return fmt.Errorf("%s: asking registry %s for access: %w", req.Ref, ref.Host, why)
	}
}

func (a *Access) answered(g grant) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return still(a.yes, g, a.cfg.Now())
}

// still says whether the time of a key is not over.
func still[K comparable](m *lru.Map[K, time.Time], k K, now time.Time) bool {
	until, _ := m.Peek(k)
	return now.Before(until)
}

// tooLate has a "no" that is still to come count for a peer that does not wait for it.
func (a *Access) tooLate(f *question, mine *accessKey) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if mine != nil {
		f.late = append(f.late, *mine)
		a.forgetRefusedLocked(f)
	}
}

// forgetRefusedLocked does nothing before there is an answer.
func (a *Access) forgetRefusedLocked(f *question) {
	if errors.Is(f.err, blockdev.ErrUnauthorized) || errors.Is(f.err, blockdev.ErrNotFound) {
		for _, k := range f.late {
			a.peers.forget(k)
		}
	}
}

// answer keeps what a registry said.
func (a *Access) answer(f *question, g grant, ref registry.Reference, err error) {
	now := a.cfg.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	f.err = err
	a.forgetRefusedLocked(f)
	switch {
	case err == nil:
		a.yes.Add(g, now.Add(a.cfg.TTL))
		if g.cred == "" {
			a.public.note(publicKey(ref), now)
		}
		a.down.Remove(ref.Host)
		a.down.Remove(g.repo)
	case errors.Is(err, blockdev.ErrUnauthorized):
		a.yes.Remove(g)
		if g.cred == "" {
			a.no.Add(g.repo, now.Add(min(negativeTTL, a.cfg.TTL)))
			a.public.forget(publicKey(ref))
		}
	}
}
