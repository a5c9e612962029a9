package access

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// fakeChecker is a registry that lets in who it is told to.
type fakeChecker struct {
	mu    sync.Mutex
	let   func(ref string, c image.Credential) error
	asked []string
	block chan struct{}
	only  string // the references that block have it in them
}

func (f *fakeChecker) Check(ctx context.Context, ref string, _ blockdev.Digest, c image.Credential) error {
	f.mu.Lock()
	f.asked = append(f.asked, c.Username+"@"+ref)
	let, block := f.let, f.block
	if !strings.Contains(ref, f.only) {
		block = nil
	}
	f.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return let(ref, c)
}

func (f *fakeChecker) set(let func(string, image.Credential) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.let, f.asked = let, nil
}

// hang makes questions about references that contain only wait, until the function that it
// returns is called.
func (f *fakeChecker) hang(only string) (answer func()) {
	block := make(chan struct{})
	f.mu.Lock()
	defer f.mu.Unlock()
	f.block, f.only = block, only
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.block, f.only = nil, ""
		close(block)
	}
}

func (f *fakeChecker) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.asked)
}

func says(err error) func(string, image.Credential) error {
	return func(string, image.Credential) error { return err }
}

var (
	errNo   = fmt.Errorf("scripted: %w", blockdev.ErrUnauthorized)
	errNone = fmt.Errorf("scripted: %w", blockdev.ErrNotFound)
	errDown = fmt.Errorf("scripted: %w", blockdev.ErrUnavailable)
	alice   = image.Credential{Username: "alice", Secret: "secret-of-alice"}
)

func onlyAlice(_ string, c image.Credential) error {
	if c == alice {
		return nil
	}
	return errNo
}

type env struct {
	*Access
	reg *fakeChecker
	mu  sync.Mutex
	t   time.Time
	dir string
	log *slog.Logger // nil: none
}

func (e *env) pass(d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.t = e.t.Add(d)
}

func (e *env) clock() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.t
}

func (e *env) open(t *testing.T) {
	t.Helper()
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	a, err := Open(Config{Dir: e.dir, Registry: e.reg, TTL: 5 * time.Minute, Grace: 24 * time.Hour, Log: e.log, Now: e.clock})
	if err != nil {
		t.Fatal(err)
	}
	e.Access = a
}

// settle waits until no registry is being asked.
func (e *env) settle() {
	for e.asking.Len() > 0 {
		runtime.Gosched()
	}
}

func newEnv(t *testing.T, let func(string, image.Credential) error) *env {
	t.Helper()
	e := &env{reg: &fakeChecker{let: let}, t: time.Now(), dir: t.TempDir()}
	e.open(t)
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// ask asks for an image as a peer.
func (e *env) may(t *testing.T, peer, name string, c image.Credential) (Verdict, error) {
	t.Helper()
	req := image.Request{Ref: "registry.example/" + name, Credential: c}
	ref, err := registry.ParseReference(req.Ref)
	if err != nil {
		t.Fatal(err)
	}
	return e.Allow(t.Context(), peer, ref, req)
}

func (e *env) want(t *testing.T, what, peer, name string, c image.Credential, v Verdict, kind error, requests int) {
	t.Helper()
	before := e.reg.count()
	got, err := e.may(t, peer, name, c)
	if kind == nil && err != nil || kind != nil && !errors.Is(err, kind) || got != v {
		t.Errorf("%s: %+v, %v; want %+v, %v", what, got, err, v, kind)
	}
	if n := e.reg.count() - before; n != requests {
		t.Errorf("%s: %d requests, want %d", what, n, requests)
	}
}

func TestPublic(t *testing.T) {
	e := newEnv(t, says(nil))
	none := image.Credential{}
	e.want(t, "first", "p1", "a:1", none, Verdict{Public: true}, nil, 1)
	e.want(t, "second peer", "p2", "a:1", none, Verdict{Public: true}, nil, 0)
	e.want(t, "with a credential", "p3", "a:2", alice, Verdict{Public: true}, nil, 0)
	e.want(t, "another repository", "p1", "b:1", none, Verdict{Public: true}, nil, 1)
	e.pass(5 * time.Minute)
	e.want(t, "next window", "p1", "a:1", none, Verdict{Public: true}, nil, 1)
	// It becomes private.
	e.pass(5 * time.Minute)
	e.reg.set(onlyAlice)
	e.want(t, "private now", "p1", "a:1", none, Verdict{}, blockdev.ErrUnauthorized, 1)
	// And nobody who had it only because everybody had keeps it.
	e.reg.set(says(errDown))
	e.pass(5 * time.Minute)
	e.want(t, "down, after it was private", "p1", "a:1", none, Verdict{}, blockdev.ErrUnavailable, 1)
}

func TestPrivate(t *testing.T) {
	e := newEnv(t, onlyAlice)
	none := image.Credential{}
	e.want(t, "with credential", "p1", "a:1", alice, Verdict{}, nil, 2)
	e.want(t, "same again", "p1", "a:1", alice, Verdict{}, nil, 0)
	e.want(t, "same credential, another peer", "p2", "a:1", alice, Verdict{}, nil, 0)
	e.want(t, "no credential", "p1", "a:1", none, Verdict{}, blockdev.ErrUnauthorized, 0)
	e.want(t, "no credential, other peer", "p3", "a:1", none, Verdict{}, blockdev.ErrUnauthorized, 0)
	e.want(t, "wrong secret", "p1", "a:1", image.Credential{Username: "alice", Secret: "x"}, Verdict{}, blockdev.ErrUnauthorized, 1)
	e.want(t, "swapped fields", "p1", "a:1", image.Credential{Username: "alicesecret-of-alice"}, Verdict{}, blockdev.ErrUnauthorized, 1)
	// The registry withdraws it: that counts when the window ends.
	e.reg.set(says(errNo))
	e.want(t, "within the window", "p1", "a:1", alice, Verdict{}, nil, 0)
	e.pass(5 * time.Minute)
	e.want(t, "after the window", "p1", "a:1", alice, Verdict{}, blockdev.ErrUnauthorized, 2)
	// Withdrawn access does not come back with an outage.
	e.reg.set(says(errDown))
	e.pass(2 * time.Minute)
	e.want(t, "down", "p1", "a:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)
}

func TestNotFoundIsNotKept(t *testing.T) {
	e := newEnv(t, says(errNone))
	e.want(t, "not there", "p", "a:1", image.Credential{}, Verdict{}, blockdev.ErrNotFound, 1)
	e.reg.set(says(nil))
	e.want(t, "pushed", "p", "a:1", image.Credential{}, Verdict{Public: true}, nil, 1)
}

// TestHidden: many registries say 404 to those who may not know.
func TestHidden(t *testing.T) {
	e := newEnv(t, func(_ string, c image.Credential) error {
		if c == alice {
			return nil
		}
		return errNone
	})
	e.want(t, "hidden", "p", "a:1", alice, Verdict{}, nil, 2)
	e.want(t, "hidden, no credential", "p", "a:1", image.Credential{}, Verdict{}, blockdev.ErrNotFound, 1)
}

func TestRegistryDown(t *testing.T) {
	e := newEnv(t, onlyAlice)
	none := image.Credential{}
	e.want(t, "up", "p1", "a:1", alice, Verdict{}, nil, 2)
	e.pass(10 * time.Minute)
	e.reg.set(says(errDown))
	e.want(t, "never had it", "p2", "a:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)
	e.want(t, "had it", "p1", "a:1", alice, Verdict{Stale: true}, nil, 1)
	e.want(t, "had it, not asked again at once", "p1", "a:1", alice, Verdict{Stale: true}, nil, 0)
	e.want(t, "had it, shows no credential", "p1", "a:1", none, Verdict{}, blockdev.ErrUnavailable, 1)
	e.want(t, "had it, shows another one", "p1", "a:1", image.Credential{Username: "alice", Secret: "guess"}, Verdict{}, blockdev.ErrUnavailable, 1)
	e.want(t, "never had it, still asked", "p2", "a:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)
	e.want(t, "had another repository", "p1", "b:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)

	// It counts after a restart too, and nothing of the credential is on disk.
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(e.dir, "access.db"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"alice", alice.Secret, registry.CredentialHash(alice)} {
		if strings.Contains(string(b), s) {
			t.Errorf("access.db holds %q", s)
		}
	}
	e.open(t)
	e.want(t, "after a restart", "p1", "a:1", alice, Verdict{Stale: true}, nil, 1)
	e.pass(24 * time.Hour)
	e.want(t, "after the grace", "p1", "a:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)
}

func TestPublicWhileDown(t *testing.T) {
	e := newEnv(t, says(nil))
	e.want(t, "up", "p1", "a:1", image.Credential{}, Verdict{Public: true}, nil, 1)
	e.pass(time.Hour)
	e.reg.set(says(errDown))
	e.want(t, "down, a peer never seen", "p9", "a:1", image.Credential{}, Verdict{Public: true, Stale: true}, nil, 1)
}

// TestOneQuestion: many who want to know the same cost one request, and one
// who gives up does not take the others along.
func TestOneQuestion(t *testing.T) {
	e := newEnv(t, says(nil))
	e.reg.block = make(chan struct{})
	req := image.Request{Ref: "registry.example/a:1"}
	ref, err := registry.ParseReference(req.Ref)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 100)
	first := make(chan error, 1)
	go func() {
		_, err := e.Allow(ctx, "first", ref, req)
		first <- err
	}()
	for e.reg.count() == 0 {
		runtime.Gosched()
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	for i := range 100 {
		go func() {
			_, err := e.Allow(t.Context(), fmt.Sprint(i), ref, req)
			errs <- err
		}()
	}
	close(e.reg.block)
	for range 100 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := e.reg.count(); n != 1 {
		t.Errorf("%d requests", n)
	}
}

// TestLateNo: a registry that is slow to say no has said it, for all who were
// not kept waiting.
func TestLateNo(t *testing.T) {
	e := newEnv(t, onlyAlice)
	e.want(t, "up", "p", "a:1", alice, Verdict{}, nil, 2)
	e.pass(10 * time.Minute)
	e.reg.set(says(errNo))
	answer := e.reg.hang("")
	// The anonymous question hangs, and so does the one with the credential, which is asked
	// although the peer waits for neither.
	if v, err := e.may(t, "p", "a:1", alice); err != nil || !v.Stale {
		t.Errorf("slow: %+v, %v", v, err)
	}
	for e.reg.count() < 2 {
		runtime.Gosched()
	}
	e.want(t, "still slow, not asked again at once", "p", "a:1", alice, Verdict{Stale: true}, nil, 0)
	answer()
	e.settle()
	e.want(t, "refused by now", "p", "a:1", alice, Verdict{}, blockdev.ErrUnauthorized, 1)
}

// TestOneRepositoryHangs: that a registry gives no answer for one repository extends no
// access to another one.
func TestOneRepositoryHangs(t *testing.T) {
	e := newEnv(t, onlyAlice)
	e.want(t, "up", "attacker", "a:1", alice, Verdict{}, nil, 2)
	e.want(t, "up", "p", "b:1", alice, Verdict{}, nil, 2)
	e.want(t, "up", "p", "c:1", alice, Verdict{}, nil, 2)
	e.pass(10 * time.Minute)
	e.reg.set(func(ref string, c image.Credential) error {
		if strings.Contains(ref, "/b:") {
			return errNo
		}
		return onlyAlice(ref, c)
	})
	answer := e.reg.hang("/a:")
	defer answer()
	if v, err := e.may(t, "attacker", "a:1", alice); err != nil || !v.Stale {
		t.Fatalf("no answer: %+v, %v", v, err)
	}
	// Both are asked about. A yes counts at once, and so does a no: that of a machine that is
	// too busy for an answer within downWait counts from the next time on.
	for name, want := range map[string]error{"b:1": blockdev.ErrUnauthorized, "c:1": nil} {
		if _, err := e.may(t, "p", name, alice); err != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		for e.asking.Len() > 2 { // those about a
			runtime.Gosched()
		}
		if v, err := e.may(t, "p", name, alice); !errors.Is(err, want) || v.Stale {
			t.Errorf("%s, again: %+v, %v; want %v", name, v, err, want)
		}
	}
}

// TestOutageIsOneLine: many that ask while a registry is down are one line in the log.
func TestOutageIsOneLine(t *testing.T) {
	e := newEnv(t, onlyAlice)
	var logs bytes.Buffer
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	e.log = slog.New(slog.NewTextHandler(&logs, nil))
	e.open(t)
	const peers, repos = 50, 20
	ask := func() {
		var wg sync.WaitGroup
		for i := range peers * repos {
			wg.Go(func() {
				if _, err := e.may(t, fmt.Sprint(i%peers), fmt.Sprintf("a%d:1", i/peers), alice); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	if _, err := e.may(t, "0", "a0:1", alice); err != nil { // hashes the credential, which takes long
		t.Fatal(err)
	}
	ask()
	e.pass(10 * time.Minute)
	e.reg.set(says(errDown))
	for range 5 {
		ask()
		e.pass(11 * time.Second) // longer than downTTL
	}
	if n := strings.Count(logs.String(), "the registry is down"); n != 1 {
		t.Errorf("%d lines within a minute for %d requests:\n%.2000s", n, 5*peers*repos, logs.String())
	}
	e.pass(time.Minute)
	ask()
	if n := strings.Count(logs.String(), "the registry is down"); n != 2 || !strings.Contains(logs.String(), "others=") {
		t.Errorf("%d lines after more than a minute, want 2, with how many were left out:\n%.2000s", n, logs.String())
	}
}

// TestLimited: a registry that limits requests is left alone about what anybody
// may have.
func TestLimited(t *testing.T) {
	f := registrytest.NewFake(t)
	f.Push(t, "a", "1", registrytest.GzipLayer(t, "a", 10, 1))
	reg, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	}()
	clock := env{t: time.Now()}
	a, err := Open(Config{Dir: t.TempDir(), Registry: reg, TTL: 5 * time.Minute, Grace: time.Hour, Log: slog.New(slog.DiscardHandler), Now: clock.clock})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}()
	may := func(want Verdict, requests int) {
		t.Helper()
		f.Forget()
		req := image.Request{Ref: f.Host + "/a:1"}
		ref, err := registry.ParseReference(req.Ref)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := a.Allow(t.Context(), "p", ref, req); err != nil || got != want || len(f.Requests()) != requests {
			t.Errorf("%+v, %v, requests %v; want %+v and %d", got, err, f.Requests(), want, requests)
		}
	}
	may(Verdict{Public: true}, 1)
	clock.pass(6 * time.Minute)
	f.Script(registrytest.Status(http.StatusTooManyRequests, "Retry-After", "120"))
	may(Verdict{Public: true, Stale: true}, 1)
	clock.pass(time.Minute)
	may(Verdict{Public: true, Stale: true}, 0)
	clock.pass(2 * time.Minute)
	may(Verdict{Public: true, Stale: true}, 1)
	clock.pass(3 * time.Minute)
	f.Script()
	may(Verdict{Public: true}, 1)
}

// TestRenewedToken: nodes get the tokens of some registries anew within hours;
// an outage may last longer.
func TestRenewedToken(t *testing.T) {
	e := newEnv(t, func(_ string, c image.Credential) error {
		if c.Username == "AWS" {
			return nil
		}
		return errNo
	})
	aws := func(token string) image.Credential { return image.Credential{Username: "AWS", Secret: token} }
	e.want(t, "up", "p", "a:1", aws("one"), Verdict{}, nil, 2)
	e.pass(10 * time.Minute)
	e.reg.set(says(errDown))
	e.want(t, "another token", "p", "a:1", aws("two"), Verdict{Stale: true}, nil, 1)
	e.want(t, "another peer", "q", "a:1", aws("one"), Verdict{}, blockdev.ErrUnavailable, 1)
	e.want(t, "another user", "p", "a:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)
}

// TestHiddenIsWithdrawn: a 404 to a credential takes access back as a refusal
// does.
func TestHiddenIsWithdrawn(t *testing.T) {
	e := newEnv(t, onlyAlice)
	e.want(t, "up", "p", "a:1", alice, Verdict{}, nil, 2)
	e.pass(10 * time.Minute)
	e.reg.set(says(errNone))
	e.want(t, "hidden", "p", "a:1", alice, Verdict{}, blockdev.ErrNotFound, 2)
	e.reg.set(says(errDown))
	e.want(t, "down", "p", "a:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)
}

// TestOwnProcess: what the process that the supernode lives in may read with a
// credential is not for everybody.
func TestOwnProcess(t *testing.T) {
	e := newEnv(t, onlyAlice)
	e.want(t, "up", "", "a:1", alice, Verdict{}, nil, 2)
	e.pass(10 * time.Minute)
	e.reg.set(says(errDown))
	e.want(t, "down, another peer", "p", "a:1", alice, Verdict{}, blockdev.ErrUnavailable, 1)
	e.want(t, "down", "", "a:1", alice, Verdict{Stale: true}, nil, 1)
}

// TestForgets: what does not count any more is not kept, on disk neither.
func TestForgets(t *testing.T) {
	e := newEnv(t, onlyAlice)
	e.want(t, "up", "p", "a:1", alice, Verdict{}, nil, 2)
	if err := e.write(); err != nil {
		t.Fatal(err)
	}
	stored := func() (n int) {
		err := e.db.View(func(tx *bbolt.Tx) error {
			n = tx.Bucket(peersBucket).Stats().KeyN
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := stored(); n != 1 {
		t.Fatalf("%d keys", n)
	}
	e.pass(25 * time.Hour)
	e.sweep(e.clock())
	if err := e.write(); err != nil {
		t.Fatal(err)
	}
	if n := stored(); n != 0 || e.peers.n != 0 {
		t.Errorf("%d keys on disk and %d in memory after the grace", n, e.peers.n)
	}
}
