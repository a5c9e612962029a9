package mirror

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// opener notes what it is told, and lets configs go when open is closed.
type opener struct {
	mu    sync.Mutex
	calls []string
	open  chan struct{}
	left  chan struct{} // closed when a wait has ended with its request
}

func (o *opener) note(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls = append(o.calls, fmt.Sprintf(format, args...))
}

func (o *opener) Show(name string, manifest blockdev.Digest, cred image.Credential) {
	o.note("show %s %s %s", name, manifest.Hex()[:4], cred.Username)
}

func (o *opener) Begin(name, tag string, manifest blockdev.Digest, layers []blockdev.Digest, cred image.Credential) {
	o.note("begin %s:%s %s %s %v", name, tag, manifest.Hex()[:4], cred.Username, layers)
}

func (o *opener) Await(ctx context.Context, _ string, _ blockdev.Digest) {
	select {
	case <-o.open:
	case <-ctx.Done():
		close(o.left)
	}
}

func (o *opener) told(call string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.calls {
		if c == call {
			return true
		}
	}
	return false
}

// fakeRegistry is a source with one private image: its index, manifest and config.
type fakeRegistry struct {
	docs map[string][]byte // by the end of the reference
	cred image.Credential

	mediaType string // of all; empty: application/json
}

var (
	imageConfig   = []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	imageManifest = fmt.Appendf(nil, `{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q},"layers":[{"digest":%q}]}`, blockdev.Sum(imageConfig), blockdev.Sum(nil))
	imageIndex    = fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[{"digest":%q}]}`, blockdev.Sum(imageManifest))
)

func newRegistry(cred image.Credential) *fakeRegistry {
	r := &fakeRegistry{cred: cred, docs: map[string][]byte{":v1": imageIndex}}
	for _, b := range [][]byte{imageConfig, imageManifest, imageIndex} {
		r.docs["@"+blockdev.Sum(b).String()] = b
	}
	return r
}

func (r *fakeRegistry) Document(_ context.Context, req image.DocumentRequest) (*image.Document, error) {
	if req.Credential != r.cred {
		return nil, fmt.Errorf("%s: %w", req.Ref, blockdev.ErrUnauthorized)
	}
	rest, ok := strings.CutPrefix(req.Ref, "r.test/a")
	b := r.docs[rest]
	if !ok || b == nil {
		return nil, fmt.Errorf("%s: %w", req.Ref, blockdev.ErrNotFound)
	}
	doc := &image.Document{Digest: blockdev.Sum(b), MediaType: cmp.Or(r.mediaType, "application/json"), Size: int64(len(b))}
	if !req.Head {
		doc.Data = b
	}
	return doc, nil
}

func manifestURL(b []byte) string {
	return "/v2/a/manifests/" + blockdev.Sum(b).String() + "?ns=r.test"
}

func blobURL(b []byte) string { return "/v2/a/blobs/" + blockdev.Sum(b).String() + "?ns=r.test" }

// A pull as containerd does it: the image is opened at its manifest, by the tag that
// was asked for, with the pull's credential; the config comes when it is open, and
// a byte now and then before.
func TestPull(t *testing.T) {
	o := &opener{open: make(chan struct{}), left: make(chan struct{})}
	m := newMirror(t, Config{Source: newRegistry(pullCredential), Opener: o})
	m.pace = 10 * time.Millisecond
	server := httptest.NewServer(m)
	defer server.Close()
	get := func(ctx context.Context, path string, header ...string) *http.Response {
		t.Helper()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+tokenFor(t, m, "r.test", "a", pullCredential))
		for i := 0; i+1 < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	if resp := get(t.Context(), blobURL(imageConfig)); resp.StatusCode != http.StatusNotFound {
		t.Errorf("a blob that no manifest has named: %s", resp.Status)
	}
	for _, path := range []string{"/v2/a/manifests/v1?ns=r.test", manifestURL(imageIndex), manifestURL(imageManifest)} {
		resp := get(t.Context(), path)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", path, resp.Status)
		}
	}
	id := blockdev.Sum(imageManifest).Hex()[:4]
	if !o.told("show r.test/a "+id+" u") || !o.told("begin r.test/a:v1 "+id+" u "+fmt.Sprint([]blockdev.Digest{blockdev.Sum(nil)})) || len(o.calls) != 4 {
		t.Errorf("the opener was told %q", o.calls)
	}

	gone, leave := context.WithCancel(t.Context())
	resp := get(gone, blobURL(imageConfig))
	one := make([]byte, 1)
	if _, err := resp.Body.Read(one); err != nil || one[0] != imageConfig[0] {
		t.Errorf("first byte of a config that is held back: %q, %v", one, err)
	}
	leave()
	<-o.left
	resp.Body.Close()

	resp = get(t.Context(), blobURL(imageConfig), "Range", "bytes=5-")
	if resp.StatusCode != http.StatusPartialContent || resp.ContentLength != int64(len(imageConfig)-5) {
		t.Errorf("from the fifth byte on: %s, %d bytes", resp.Status, resp.ContentLength)
	}
	if _, err := resp.Body.Read(one); err != nil || one[0] != imageConfig[5] {
		t.Errorf("fifth byte: %q, %v", one, err)
	}
	close(o.open)
	var rest bytes.Buffer
	if _, err := rest.ReadFrom(resp.Body); err != nil || !bytes.Equal(rest.Bytes(), imageConfig[6:]) {
		t.Errorf("rest of the config: %q, %v", rest.Bytes(), err)
	}
	resp.Body.Close()
}

// A pull that sends only a HEAD has shown its right for this machine's manifests that
// the index lists, and nothing is opened for it: it may not be for this snapshotter.
func TestHeadOnly(t *testing.T) {
	digest := func(s string) blockdev.Digest { return blockdev.Sum([]byte(s)) }
	entry := func(name, os, arch string) string {
		return fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"platform":{"os":%q,"architecture":%q}}`, digest(name), os, arch)
	}
	other := map[string]string{"amd64": "arm64"}[runtime.GOARCH]
	if other == "" {
		other = "amd64"
	}
	list := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[%s,%s,%s,{"digest":"nonsense"}]}`, ocispec.MediaTypeImageIndex,
		entry("other", "linux", other), entry("mine", "linux", runtime.GOARCH), entry("windows", "windows", runtime.GOARCH))
	for _, c := range []struct {
		name  string
		cred  image.Credential
		calls []string
	}{
		{"private", pullCredential, []string{"show r.test/a " + blockdev.Sum(list).Hex()[:4] + " u", "show r.test/a " + digest("mine").Hex()[:4] + " u"}},
		{"public", image.Credential{}, []string{"show r.test/a " + blockdev.Sum(list).Hex()[:4] + " "}}, // there is no right to show
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := newRegistry(c.cred)
			reg.mediaType = ocispec.MediaTypeImageIndex
			reg.docs[":v1"], reg.docs["@"+blockdev.Sum(list).String()] = list, list
			o := &opener{}
			m := newMirror(t, Config{Source: reg, Opener: o})
			if resp, body := send(t, m, "HEAD", "/v2/a/manifests/v1?ns=r.test", c.cred); resp.StatusCode != http.StatusOK {
				t.Fatalf("%s %s", resp.Status, body)
			}
			if !slices.Equal(o.calls, c.calls) {
				t.Errorf("the opener was told %q, want %q", o.calls, c.calls)
			}
			if tag := m.known.tag("r.test/a", digest("mine")); c.name == "private" && tag != "v1" {
				t.Errorf("the manifest's tag: %q", tag)
			}
		})
	}
}

// sentAt records when bytes of an answer were written.
type sentAt struct {
	*httptest.ResponseRecorder
	times []time.Time
}

func (s *sentAt) Write(b []byte) (int, error) {
	for range b {
		s.times = append(s.times, time.Now())
	}
	return s.ResponseRecorder.Write(b)
}

// The bytes of a config that is held back come more often than any sensible
// time-out for progress, and last for an hour, whatever is in the config.
func TestHeldConfigGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &opener{open: make(chan struct{})}
		m := newMirror(t, Config{Source: newRegistry(pullCredential), Opener: o})
		doc := &image.Document{Data: bytes.Repeat([]byte("x"), 180), Size: 180}
		began := time.Now()
		time.AfterFunc(time.Hour, func() { close(o.open) })
		w := &sentAt{ResponseRecorder: httptest.NewRecorder()}
		m.giveConfig(w, httptest.NewRequest(http.MethodGet, "/", nil), target{name: "r.test/a"}, doc, blockdev.Digest{})
		if d := time.Since(began); d != time.Hour || w.Body.Len() != 180 {
			t.Fatalf("%d bytes after %v", w.Body.Len(), d)
		}
		last := began
		for i, at := range w.times {
			if most := max(3*time.Second, at.Sub(began)/20); at.Sub(last) > min(most, time.Minute) {
				t.Errorf("byte %d came %v after the one before, %v after the beginning", i, at.Sub(last), at.Sub(began))
			}
			last = at
		}
	})
}

// Who may have what: each pull what its own credential opens.
func TestCredentials(t *testing.T) {
	ann, bob := image.Credential{Username: "ann", Secret: "a"}, image.Credential{Username: "bob", Secret: "b"}
	var logs bytes.Buffer
	o := &opener{open: make(chan struct{})}
	close(o.open)
	m := newMirror(t, Config{Source: newRegistry(ann), Opener: o, Log: slog.New(slog.NewTextHandler(&logs, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	url := manifestURL(imageManifest)
	for _, c := range []struct {
		name   string
		cred   image.Credential
		status int
	}{{"right", ann, 200}, {"wrong", bob, 401}, {"none", image.Credential{}, 401}} {
		if resp, body := send(t, m, "GET", url, c.cred); resp.StatusCode != c.status {
			t.Errorf("%s credential: %s %s", c.name, resp.Status, body)
		}
	}
	if len(o.calls) != 2 {
		t.Errorf("the opener was told %q", o.calls)
	}
	// A token is for one repository, and no other word is one.
	word := tokenFor(t, m, "r.test", "other", ann)
	for name, v := range map[string]string{
		"another repository's": "Bearer " + word, "made up": "Bearer x", "no token": "", "password": "Basic " + base64.StdEncoding.EncodeToString([]byte("ann:a")),
	} {
		resp, _ := send(t, m, "GET", url, ann, func(r *http.Request) { r.Header.Set("Authorization", v) })
		want := `Bearer realm="http://example.com/token",service="r.test",scope="repository:a:pull"`
		if got := resp.Header.Get("WWW-Authenticate"); resp.StatusCode != 401 || !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s %s", name, resp.Status, got)
		}
	}
	// Its life is short.
	word = tokenFor(t, m, "r.test", "a", ann)
	m.now = func() time.Time { return time.Now().Add(tokenLife + time.Second) }
	resp, _ := send(t, m, "GET", url, ann, func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+word) })
	if resp.StatusCode != 401 || !strings.Contains(resp.Header.Get("WWW-Authenticate"), "invalid_token") {
		t.Errorf("expired token: %s %v", resp.Status, resp.Header)
	}
	for _, secret := range []string{"secret-b", word} {
		if strings.Contains(logs.String(), secret) {
			t.Errorf("the log has a secret in it:\n%s", logs.String())
		}
	}
}

// The other ways to ask for a token: Basic after a refused POST, and an identity
// token.
func TestTokenForms(t *testing.T) {
	m := newMirror(t, Config{Source: newRegistry(pullCredential)})
	for _, c := range []struct {
		r    *http.Request
		want image.Credential
		code int
	}{
		{httptest.NewRequest("GET", "/token?service=r.test&scope=repository:a:pull", nil), pullCredential, 200},
		{httptest.NewRequest("POST", "/token", strings.NewReader("service=R.test&scope=repository:a:pull&grant_type=refresh_token&refresh_token=t")), image.Credential{Secret: "t"}, 200},
		{httptest.NewRequest("GET", "/token?service=r.test", nil), image.Credential{}, 400},
		{httptest.NewRequest("GET", "/token?service=r/t&scope=repository:a:pull", nil), image.Credential{}, 400},
		{httptest.NewRequest("POST", "/token", strings.NewReader(strings.Repeat("x", maxForm+1))), image.Credential{}, 400},
		{httptest.NewRequest("PUT", "/token", nil), image.Credential{}, 405},
	} {
		if c.want == pullCredential {
			c.r.SetBasicAuth("u", "s")
		}
		c.r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		m.ServeHTTP(w, c.r)
		var got struct{ Token string }
		_ = json.Unmarshal(w.Body.Bytes(), &got)
		g, _ := m.tokens.find(got.Token, time.Now())
		if w.Code != c.code || g.cred != c.want || c.code == 200 && g.name != "r.test/a" {
			t.Errorf("%s %s: %d %+v", c.r.Method, c.r.URL, w.Code, g)
		}
	}
	for i := range maxTokens + 10 {
		m.tokens.add(grant{name: fmt.Sprint(i)}, time.Now())
	}
	if m.tokens.m.Len() > maxTokens {
		t.Errorf("%d tokens are kept", m.tokens.m.Len())
	}
}

type nodeCredentials image.Credential

func (n nodeCredentials) Credential(context.Context, string) (image.Credential, error) {
	return image.Credential(n), nil
}

// The node's own credential opens what a pull's does not only where that is wanted.
func TestNodeCredentials(t *testing.T) {
	o := &opener{}
	m := newMirror(t, Config{Source: newRegistry(pullCredential), Opener: o, NodeCredentials: nodeCredentials(pullCredential)})
	if resp, body := send(t, m, "GET", manifestURL(imageManifest), image.Credential{}); resp.StatusCode != 200 {
		t.Errorf("%s %s", resp.Status, body)
	}
	if !o.told("show r.test/a " + blockdev.Sum(imageManifest).Hex()[:4] + " u") {
		t.Errorf("the opener was told %q", o.calls)
	}
}

// Names that mean something on this machine alone are not asked of another one, nor
// does anything under another Host reach the mirror.
func TestNames(t *testing.T) {
	asked := 0
	s := source(func(_ context.Context, req image.DocumentRequest) (*image.Document, error) {
		asked++
		return nil, fmt.Errorf("%s: %w", req.Ref, blockdev.ErrNotFound)
	})
	m := newMirror(t, Config{Source: s, Remote: true, Address: "127.0.0.1:7704"})
	for _, ns := range []string{"localhost:5000", "127.0.0.1:5000", "[::1]:5000", "reg:5000"} {
		r := httptest.NewRequest("GET", "/v2/a/manifests/v1?ns="+ns, nil)
		r.Host = "127.0.0.1:7704"
		w := httptest.NewRecorder()
		m.ServeHTTP(w, r)
		if w.Code != 404 {
			t.Errorf("%s: %d", ns, w.Code)
		}
	}
	if asked > 0 {
		t.Errorf("another machine was asked %d times for a name of this one", asked)
	}
	for host, want := range map[string]int{"127.0.0.1:7704": 200, "localhost": 200, "[::1]:7704": 200, "evil.test:7704": 421, "": 421} {
		r := httptest.NewRequest("GET", "/v2/", nil)
		r.Host = host
		w := httptest.NewRecorder()
		m.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("Host %q: %d, want %d", host, w.Code, want)
		}
	}
}

// A source that hangs is waited for once; what comes late is at hand for the next
// one, and the image is opened all the same.
func TestLate(t *testing.T) {
	gate := make(chan struct{})
	real := newRegistry(pullCredential)
	s := source(func(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
		<-gate
		return real.Document(ctx, req)
	})
	o := &opener{open: make(chan struct{})}
	m := newMirror(t, Config{Source: s, Opener: o})
	m.health.patience, m.health.impatience = 20*time.Millisecond, time.Millisecond
	typed := func(r *http.Request) { r.Header.Set("Accept", "application/vnd.oci.image.manifest.v1+json, */*") }
	for range 2 {
		resp, _ := send(t, m, "GET", manifestURL(imageManifest), pullCredential, typed)
		if resp.StatusCode != 401 || !strings.Contains(resp.Header.Get("WWW-Authenticate"), "error=") {
			t.Errorf("%s %v", resp.Status, resp.Header)
		}
	}
	if wait, _ := m.health.begin("r.test", time.Now()); wait != m.health.impatience {
		t.Errorf("the next one waits %v", wait)
	}
	m.health.end("r.test", false)
	if !o.told("begin r.test/a: " + blockdev.Sum(imageManifest).Hex()[:4] + " u []") {
		t.Errorf("the opener was told %q", o.calls)
	}
	for range maxLate {
		send(t, m, "HEAD", manifestURL(imageManifest), pullCredential)
	}
	if _, ok := m.health.begin("r.test", time.Now()); ok {
		t.Error("there is no bound on questions that nobody waits for")
	}
	close(gate)
	m.health.impatience = time.Minute
	for {
		resp, _ := send(t, m, "GET", manifestURL(imageManifest), pullCredential)
		if resp.StatusCode == 200 {
			break
		}
	}
	if wait, _ := m.health.begin("r.test", time.Now()); wait != m.health.patience {
		t.Errorf("after an answer the next one waits %v", wait)
	}
}

// The certificate is good for the mirror and comes from an authority that stays;
// nobody else's does, nor does plain HTTP.
func TestAuthority(t *testing.T) {
	dir := t.TempDir()
	a, err := OpenAuthority(dir, "mirror.test:7704", nil)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(dir, keyFile)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("key: %v %v", fi.Mode(), err)
	}
	pem, err := os.ReadFile(filepath.Join(dir, CAFile))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		t.Fatal("no certificate")
	}
	answers := func(a *Authority, name string) error {
		ln, err := tls.Listen("tcp", "127.0.0.1:0", a.TLS())
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go func() {
			if c, err := ln.Accept(); err == nil {
				_ = c.(*tls.Conn).HandshakeContext(t.Context())
				_ = c.Close()
			}
		}()
		c, err := tls.Dial("tcp", ln.Addr().String(), &tls.Config{RootCAs: roots, ServerName: name})
		if err == nil {
			err = c.Close()
		}
		return err
	}
	for _, name := range []string{"127.0.0.1", "localhost", "mirror.test"} {
		if err := answers(a, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := answers(a, "docker.io"); err == nil {
		t.Error("a certificate for docker.io")
	}
	again, err := OpenAuthority(dir, "mirror.test:7704", nil)
	if err != nil || answers(again, "localhost") != nil {
		t.Errorf("after a restart: %v", err)
	}
	other, err := OpenAuthority(t.TempDir(), "mirror.test:7704", nil)
	var unknown x509.UnknownAuthorityError
	if err != nil || !errors.As(answers(other, "localhost"), &unknown) {
		t.Errorf("another authority's: %v", err)
	}
	// Before it ends, the certificate and then the authority are made anew.
	first, err := a.certificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	a.now = func() time.Time { return time.Now().Add(leafLife * 3 / 4) }
	if second, err := a.certificate(nil); err != nil || second == first {
		t.Errorf("the certificate is not made anew: %v", err)
	}
	if _, err := openAuthority(dir, "mirror.test:7704", nil, func() time.Time { return time.Now().Add(caLife - leafLife) }); err != nil {
		t.Fatal(err)
	}
	if now, err := os.ReadFile(filepath.Join(dir, CAFile)); err != nil || bytes.Equal(now, pem) {
		t.Errorf("the authority is not made anew: %v", err)
	}
	for _, name := range []string{keyFile, CAFile} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenAuthority(dir, "mirror.test:7704", nil); err != nil {
			t.Errorf("damaged %s: %v", name, err)
		}
	}
}
