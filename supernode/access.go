package supernode

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
	"github.com/shoalfs/shoal/supernode/registry"
)

// checker asks a registry whether a credential may pull; nil means yes.
type checker interface {
	Check(ctx context.Context, ref string, manifest blockdev.Digest, cred blockdev.Credential) error
}

// accessFile is where it is kept who had access.
const accessFile = "access.db"

const (
	// negativeTTL is how long a registry's "no" to anonymous access is believed.
	// It only saves requests: a node with a credential asks with it anyway.
	negativeTTL = time.Minute
	// graceWait is how long a registry may take to answer if there is the grace
	// to fall back on; downTTL is how long it is not asked again after that.
	graceWait = 3 * time.Second
	downTTL   = 10 * time.Second
	// maxAnswers bounds the answers kept in memory.
	maxAnswers = 1 << 16
	flushEvery = time.Second
)

// access decides who may read a repository: whoever the registry lets in.
//
// A yes counts for ttl. It is kept by credential and repository: whoever shows
// the same credential would get the same answer, so a thousand nodes with one
// pull secret cost the registry one request. A repository that anybody may pull
// needs one anonymous request for everybody.
//
// For the time when the registry is down, it is kept on disk when which peer had
// access to which repository, without any trace of the credential.
type access struct {
	reg        checker
	ttl, grace time.Duration
	now        func() time.Time
	log        *slog.Logger
	db         *bbolt.DB
	stop       context.CancelFunc
	ctx        context.Context // of checks, which outlive the request that began them
	done       chan struct{}
	running    sync.WaitGroup

	mu      sync.Mutex
	failed  error // of the last write
	flights map[string]*question
	yes     map[grant]time.Time // until when
	no      map[string]time.Time
	down    map[string]time.Time // registry host -> not asked before
	seen    map[string]time.Time // grace key -> last access; what is not on disk yet, or known from there
	pending map[string]int64     // grace key -> Unix seconds to write; 0: delete
}

// question is one that a registry is being asked; err is set when done is closed.
type question struct {
	done chan struct{}
	err  error
}

// grant is a repository and who may read it: the hash of a credential, or "" for
// everybody.
type grant struct{ repo, cred string }

var graceBucket = []byte("grace-1")

func openAccess(dir string, reg checker, ttl, grace time.Duration, log *slog.Logger, now func() time.Time) (*access, error) {
	file := filepath.Join(dir, accessFile)
	if err := boltcheck.File(file, nil); errors.Is(err, blockdev.ErrCorrupt) {
		aside, aerr := boltcheck.SetAside(file)
		if aerr != nil {
			return nil, aerr
		}
		log.Error("the record of who had access is damaged and was set aside; until nodes have asked again, none has access while its registry is down",
			"aside", aside, "error", err)
	}
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		return nil, fmt.Errorf("%s (is another supernode using the directory?): %w", file, err)
	}
	a := &access{reg: reg, ttl: ttl, grace: grace, now: now, log: log, db: db, done: make(chan struct{}),
		flights: map[string]*question{}, yes: map[grant]time.Time{}, no: map[string]time.Time{}, down: map[string]time.Time{}, seen: map[string]time.Time{}, pending: map[string]int64{}}
	if err := a.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", file, err), db.Close())
	}
	a.ctx, a.stop = context.WithCancel(context.Background())
	go a.flush()
	return a, nil
}

// load reads who had access, and drops what is too old to count.
func (a *access) load() error {
	return a.db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(graceBucket)
		if err != nil {
			return err
		}
		var old [][]byte
		err = b.ForEach(func(k, v []byte) error {
			if len(v) == 8 {
				at := time.Unix(int64(binary.BigEndian.Uint64(v)), 0)
				if age := a.now().Sub(at); age >= 0 && age < a.grace {
					a.seen[string(k)] = at
					return nil
				}
			}
			old = append(old, append([]byte(nil), k...))
			return nil
		})
		for _, k := range old {
			err = errors.Join(err, b.Delete(k))
		}
		return err
	})
}

// Close ends running checks and writes what is pending.
func (a *access) Close() error {
	a.stop()
	<-a.done
	a.running.Wait()
	return errors.Join(a.write(), a.db.Close())
}

func (a *access) flush() {
	defer close(a.done)
	t := time.NewTicker(flushEvery)
	defer t.Stop()
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-t.C:
			err := a.write()
			a.mu.Lock()
			a.failed = err
			a.mu.Unlock()
			if err != nil {
				a.log.Error("cannot write down who had access; it will not count after a restart", "error", err)
			}
		}
	}
}

func (a *access) write() error {
	a.mu.Lock()
	pending := a.pending
	a.pending = map[string]int64{}
	a.mu.Unlock()
	if len(pending) == 0 {
		return nil
	}
	err := a.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(graceBucket)
		for k, at := range pending {
			if at == 0 {
				if err := b.Delete([]byte(k)); err != nil {
					return err
				}
				continue
			}
			if err := b.Put([]byte(k), binary.BigEndian.AppendUint64(nil, uint64(at))); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil { // to be written next time, unless there is something newer
		a.mu.Lock()
		for k, at := range pending {
			if _, newer := a.pending[k]; !newer {
				a.pending[k] = at
			}
		}
		a.mu.Unlock()
	}
	return err
}

// healthy says whether who had access can be written down: whether the disk
// takes writes.
func (a *access) healthy() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failed
}

// verdict is a yes.
type verdict struct {
	// public: no credential is needed.
	public bool
	// stale: the registry could not be asked; an earlier yes counts.
	stale bool
}

// allow says whether a peer may read the repository of req.Ref. No is an error:
// the registry's, or ErrUnavailable if it cannot be asked.
func (a *access) allow(ctx context.Context, peer string, ref registry.Reference, req blockdev.ImageRequest) (verdict, error) {
	repo := ref.Name()
	cred := registry.CredentialHash(req.Credential)
	g := grant{repo, cred}
	now := a.now()
	a.mu.Lock()
	public := now.Before(a.yes[grant{repo, ""}])
	own := cred != "" && now.Before(a.yes[g])
	notPublic := now.Before(a.no[repo])
	_, everybody := a.had("", repo, now)
	_, before := a.had(peer, repo, now)
	isDown := now.Before(a.down[ref.Host])
	a.mu.Unlock()
	before = before || everybody
	switch {
	case public:
		return verdict{public: true}, nil
	case own:
		a.note(peer, repo, now)
		return verdict{}, nil
	case isDown && before:
		return verdict{public: everybody, stale: true}, nil
	}

	err := fmt.Errorf("%s: the registry wants a credential and none was given: %w", req.Ref, blockdev.ErrUnauthorized)
	if !notPublic {
		if err = a.ask(ctx, grant{repo, ""}, ref, req, before); err == nil {
			return verdict{public: true}, nil
		}
	}
	if cred != "" && (errors.Is(err, blockdev.ErrUnauthorized) || errors.Is(err, blockdev.ErrNotFound) || limited(err)) {
		if err = a.ask(ctx, g, ref, req, before); err == nil {
			a.note(peer, repo, a.now())
			return verdict{}, nil
		}
	}
	switch {
	case errors.Is(err, blockdev.ErrUnauthorized) && cred != "":
		a.revoke(peer, repo)
	case errors.Is(err, blockdev.ErrUnavailable) && before:
		a.log.Warn("the registry cannot be asked; access that was there before counts", "image", req.Ref, "peer", peer, "error", err)
		a.mu.Lock()
		bound(a.down)
		a.down[ref.Host] = a.now().Add(downTTL)
		a.mu.Unlock()
		return verdict{public: everybody, stale: true}, nil
	}
	return verdict{}, err
}

// limited tells whether a registry refuses more requests, which it may do for
// anonymous ones alone.
func limited(err error) bool {
	var e *registry.Error
	return errors.As(err, &e) && e.Status == http.StatusTooManyRequests
}

// ask asks the registry, once for all who want to know the same at the same time.
func (a *access) ask(ctx context.Context, g grant, ref registry.Reference, req blockdev.ImageRequest, hurry bool) error {
	cred := req.Credential
	if g.cred == "" {
		cred = blockdev.Credential{}
	}
	// The manifest belongs to the key: that one image is not there says nothing
	// about the next one.
	key := g.repo + "\x00" + g.cred + "\x00" + req.Ref + "\x00" + req.Manifest.Hex()
	a.mu.Lock()
	if a.now().Before(a.yes[g]) { // answered since the caller looked
		a.mu.Unlock()
		return nil
	}
	f := a.flights[key]
	if f == nil {
		if a.ctx.Err() != nil {
			a.mu.Unlock()
			return fmt.Errorf("%s: the supernode is stopping: %w", req.Ref, blockdev.ErrUnavailable)
		}
		f = &question{done: make(chan struct{})}
		a.flights[key] = f
		a.running.Add(1)
		go func() {
			defer a.running.Done()
			f.err = a.reg.Check(a.ctx, req.Ref, req.Manifest, cred)
			a.answer(g, ref.Host, key, f.err)
			close(f.done)
		}()
	}
	a.mu.Unlock()
	var late <-chan time.Time
	if hurry {
		t := time.NewTimer(graceWait)
		defer t.Stop()
		late = t.C
	}
	select {
	case <-f.done:
		if f.err != nil && a.ctx.Err() != nil {
			return fmt.Errorf("%s: the supernode is stopping: %w", req.Ref, blockdev.ErrUnavailable)
		}
		return f.err
	case <-late:
		return fmt.Errorf("%s: registry %s has not answered for %s: %w", req.Ref, ref.Host, graceWait, blockdev.ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("%s: asking the registry for access: %w", req.Ref, ctx.Err())
	}
}

// answer keeps what a registry said.
func (a *access) answer(g grant, host, key string, err error) {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.flights, key)
	switch {
	case err == nil:
		bound(a.yes)
		a.yes[g] = now.Add(a.ttl)
		if g.cred == "" {
			a.noteLocked("", g.repo, now)
		}
		delete(a.down, host)
	case errors.Is(err, blockdev.ErrUnauthorized):
		delete(a.yes, g)
		if g.cred == "" {
			bound(a.no)
			a.no[g.repo] = now.Add(min(negativeTTL, a.ttl))
			a.forgetLocked("", g.repo)
		}
	}
}

func graceKey(peer, repo string) string {
	d := blockdev.Sum([]byte(fmt.Sprintf("%d:%s%s", len(peer), peer, repo)))
	return string(d[:])
}

// had says when the peer ("": anybody) had access last, if that still counts.
func (a *access) had(peer, repo string, now time.Time) (time.Time, bool) {
	at, ok := a.seen[graceKey(peer, repo)]
	age := now.Sub(at)
	return at, ok && age >= -time.Minute && age < a.grace
}

func (a *access) note(peer, repo string, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.noteLocked(peer, repo, now)
}

func (a *access) noteLocked(peer, repo string, now time.Time) {
	k := graceKey(peer, repo)
	if old, ok := a.seen[k]; ok && now.Sub(old) < a.ttl && now.After(old) {
		return // fresh enough; spares the disk
	}
	bound(a.seen)
	a.seen[k] = now
	a.pending[k] = now.Unix()
}

// revoke takes back what a peer would have kept: the registry has said no.
func (a *access) revoke(peer, repo string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forgetLocked(peer, repo)
}

func (a *access) forgetLocked(peer, repo string) {
	k := graceKey(peer, repo)
	if _, ok := a.seen[k]; ok {
		delete(a.seen, k)
		a.pending[k] = 0
	}
}

// bound makes room in a map of maxAnswers times.
func bound[K comparable](m map[K]time.Time) {
	if len(m) >= maxAnswers {
		dropOldest(m)
	}
}

// dropOldest drops the oldest eighth of the time that a map spans.
func dropOldest[K comparable](m map[K]time.Time) {
	var lo, hi time.Time
	for _, t := range m {
		if lo.IsZero() || t.Before(lo) {
			lo = t
		}
		if t.After(hi) {
			hi = t
		}
	}
	cut := lo.Add(hi.Sub(lo) / 8)
	for k, t := range m {
		if !t.After(cut) {
			delete(m, k)
		}
	}
}
