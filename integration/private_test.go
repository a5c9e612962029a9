package integration

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestPrivateImage: with docker's credential for the registry, and the config's word
// that pulls may use it, a private image is lazy without the mirror; without it
// the supernode hands out nothing, though it has the layers, and containerd meets the
// registry's own refusal.
func TestPrivateImage(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	storage := l.Path("images")
	open := must(l.StartRegistry(ctx, "open", storage, ""))(t)
	if _, err := open.Push(ctx, "secret/app", "v1", []string{"/bin/true"}, layer(t, dir("d/"), file("d/f", bigContent(1)))); err != nil {
		t.Fatal(err)
	}
	if err := open.Stop(); err != nil {
		t.Fatal(err)
	}
	hash, err := exec.CommandContext(ctx, "htpasswd", "-nbB", "ann", "s3cret-word").Output()
	if err != nil {
		t.Fatalf("htpasswd: %v: `make setup` installs it", err)
	}
	htpasswd := l.Path("htpasswd")
	if err := os.WriteFile(htpasswd, hash, 0o600); err != nil {
		t.Fatal(err)
	}
	private := must(l.StartRegistry(ctx, "private", storage, htpasswd))(t)
	ref := private.Addr + "/secret/app:v1"

	super := must(l.StartSupernode(ctx, "super", ""))(t)
	docker := l.Path("docker")
	if err := os.MkdirAll(docker, 0o700); err != nil {
		t.Fatal(err)
	}
	auth := base64.StdEncoding.EncodeToString([]byte("ann:s3cret-word"))
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, private.Addr, auth)
	if err := os.WriteFile(filepath.Join(docker, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := l.Path("empty")
	if err := os.MkdirAll(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	nodeFor := func(name, dir string) (*lab.Node, *lab.Containerd) {
		n := must(l.StartNode(ctx, name, super.Address, fmt.Sprintf("docker_config = %q\nnode_credentials_for_pulls = true\n", dir)))(t)
		return n, must(l.StartContainerd(ctx, name+"-ctrd", lab.ContainerdOptions{Shoal: n.Socket}))(t)
	}
	node, ctrd := nodeFor("ann", docker)
	if err := ctrd.Pull(ctx, "shoal", ref, "--user", "ann:s3cret-word"); err != nil {
		t.Fatal(err)
	}
	if !listed(t, node, ref) {
		t.Error("with the credential the image is not lazy")
	}
	other, ctrd2 := nodeFor("bob", empty)
	if err := ctrd2.Pull(ctx, "shoal", ref); err == nil {
		t.Error("without a credential the pull went through")
	}
	if listed(t, other, ref) {
		t.Error("without a credential the image is lazy on the node")
	}
	_, err = l.Run(ctx, "shoal", "prefetch", "--control", other.Control, ref)
	if err == nil || !strings.Contains(err.Error(), "denied") {
		t.Errorf("prefetch without a credential: got %v, want an error that says that access is denied", err)
	}
	for _, log := range []string{node.Log, super.Log, other.Log} {
		if b := must(os.ReadFile(log))(t); strings.Contains(string(b), "s3cret-word") || strings.Contains(string(b), auth) {
			t.Errorf("%s has the secret in it", log)
		}
	}
}

// TestDrillPrivate: while a private image is read whose bytes are still on their way,
// the tokens that were given out expire, the password is exchanged, node and
// supernode are restarted or the supernode loses its store or goes away. The image
// goes on being read and is mounted anew, and its next version is lazy as well.
func TestDrillPrivate(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	d := &tally{drill: "private image: token expired, credentials rotated, daemon restarted", rounds: min(rounds(t, 6), 18)}
	open := must(l.StartRegistry(ctx, "open", l.Path("images"), ""))(t)
	gate := newTokenGate(t, open.Addr)
	docker := l.Path("docker")
	noError(t, os.MkdirAll(docker, 0o700))
	rotate := func(password string) {
		gate.rotate(password)
		auth := base64.StdEncoding.EncodeToString([]byte("ann:" + password))
		config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, gate.addr, auth)
		noError(t, os.WriteFile(filepath.Join(docker, "config.json"), []byte(config), 0o600))
	}
	rotate("first")
	s := &keptSite{site: &site{Lab: l, registry: open}}
	s.supernode = must(l.StartSupernode(ctx, "super", `registry.access_ttl = "1s"`))(t)
	s.link = must(s.NewLink(s.supernode.HostPort(), 8<<20, 0))(t)
	s.node = must(s.StartKeptNode(ctx, "node", s.supernode.Via(s.link), fmt.Sprintf("docker_config = %q\n", docker)))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket, Mirror: s.node.Mirror, MirrorCA: s.node.MirrorCA}))(t)
	eager := 0
	pull := func(ref string) (view string) {
		noError(t, s.Pull(ctx, "shoal", ref, "--user", "ann:"+gate.password))
		if !s.isLazy(t, ctx, ref) {
			t.Logf("%s is not lazy: %s", ref, logLine(t, s.node.Log, ref))
			eager++
		}
		return s.mountImage(t, "shoal", ref)
	}
	for i := range d.rounds {
		name := fmt.Sprint("secret/app", i)
		one, a := noisy(t, "a", uint64(7000+3*i), 4)
		two, b := noisy(t, "b", uint64(7001+3*i), 4)
		next, c := noisy(t, "c", uint64(7002+3*i), 1)
		must(open.Push(ctx, name, "v1", []string{"/bin/true"}, one, two))(t)
		must(open.Push(ctx, name, "v2", []string{"/bin/true"}, one, two, next))(t)
		ref := gate.addr + "/" + name
		view := pull(ref + ":v1")
		wait(ctx, rand.N(300*time.Millisecond))
		back := func() {}
		switch i % 6 {
		case 0:
			wait(ctx, 2*tokenLife)
		case 1:
			rotate(fmt.Sprint("word-", i))
		case 2:
			rotate(fmt.Sprint("word-", i))
			must(s.node.KillNode(ctx))(t)
		case 3:
			back = s.takeAway(t, 0) // the node asks the registry itself
		case 4:
			rotate(fmt.Sprint("word-", i))
			s.takeAway(t, 0)()
		case 5:
			rotate(fmt.Sprint("word-", i))
			s.takeAway(t, 1)()
		}
		d.file(filepath.Join(view, "a"), a)
		again := s.mountImage(t, "shoal", ref+":v1")
		d.file(filepath.Join(again, "b"), b)
		back()
		noError(t, lab.WaitFor(ctx, "the node connected again", 30*time.Second, func() error {
			n, err := s.node.Metric(ctx, "shoal_node_supernodes")
			if err == nil && n == 0 {
				err = errors.New("it is member of none")
			}
			return err
		}))
		d.file(filepath.Join(pull(ref+":v2"), "c"), c)
	}
	d.rows(t)
	count(t, d.drill+": images that were not lazy", eager)
	if gate.expired.Load() == 0 {
		t.Error("no token has expired in use")
	}
}

// tokenLife is for how long a token opens the gate.
const tokenLife = time.Second

// tokenGate stands before a registry that anybody may read, and lets in who has a
// token: it gives them out to who knows the password, and they expire.
type tokenGate struct {
	addr    string
	proxy   http.Handler
	expired atomic.Int64 // requests with a token that had been good

	mu       sync.Mutex
	password string
	tokens   map[string]time.Time // until when they are good
}

func newTokenGate(t *testing.T, registry string) *tokenGate {
	t.Helper()
	g := &tokenGate{
		proxy:  httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry}),
		tokens: map[string]time.Time{},
	}
	server := httptest.NewServer(g)
	t.Cleanup(server.Close)
	g.addr = server.Listener.Addr().String()
	return g
}

// rotate exchanges the password; tokens that were got with the old one end.
func (g *tokenGate) rotate(password string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.password = password
	for token := range g.tokens {
		g.tokens[token] = time.Time{}
	}
}

// ServeHTTP implements http.Handler.
func (g *tokenGate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		g.token(w, r)
		return
	}
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	g.mu.Lock()
	until, known := g.tokens[token]
	g.mu.Unlock()
	if time.Now().Before(until) {
		g.proxy.ServeHTTP(w, r)
		return
	}
	if known {
		g.expired.Add(1)
	}
	repository, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/manifests/")
	repository, _, _ = strings.Cut(repository, "/blobs/")
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="lab",scope="repository:%s:pull"`, g.addr, repository))
	http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
}

// token gives a token out.
func (g *tokenGate) token(w http.ResponseWriter, r *http.Request) {
	user, password, _ := r.BasicAuth()
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case r.Method != http.MethodGet: // as with many registries, so that clients take the other way
		http.Error(w, "use GET", http.StatusMethodNotAllowed)
	case user != "ann" || password != g.password:
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
	default:
		token := fmt.Sprintf("token-%d", len(g.tokens))
		g.tokens[token] = time.Now().Add(tokenLife)
		fmt.Fprintf(w, `{"token":%q,"expires_in":60}`, token)
	}
}

// listed says whether a node has ref as a lazy image.
func listed(t *testing.T, n *lab.Node, ref string) bool {
	t.Helper()
	for _, im := range must(n.Status(t.Context()))(t).Images {
		if im.Ref == ref {
			return true
		}
	}
	return false
}
