package mirror

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/lru"
)

const (
	// tokenLife is for how long a token stands for a credential. containerd gets a
	// new one when it is told that its own has ended.
	tokenLife = 15 * time.Minute
	maxTokens = 4096
	// maxForm bounds what is read of a request for a token, in bytes. Tokens of
	// cloud providers are a few kilobytes.
	maxForm = 64 << 10
)

// tokens are random words that stand for a pull's credential: each for one
// repository of one registry. They are in memory alone.
type tokens struct {
	mu sync.Mutex
	m  *lru.Map[string, grant]
}

func newTokens() *tokens {
	return &tokens{m: lru.New[string, grant](maxTokens)}
}

type grant struct {
	name  string // host/repository
	cred  image.Credential
	until time.Time
}

// add returns a new token.
func (t *tokens) add(g grant, now time.Time) string {
	word := rand.Text()
	t.mu.Lock()
	defer t.mu.Unlock()
	g.until = now.Add(tokenLife)
	t.m.Add(word, g)
	return word
}

// find returns what a token stands for.
func (t *tokens) find(word string, now time.Time) (grant, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	g, ok := t.m.Get(word)
	if ok && !now.Before(g.until) {
		t.m.Remove(word)
		ok = false
	}
	return g, ok
}

// token answers a request for a token: with what containerd has for this pull,
// which may be nothing. Whether that opens anything the registry says later.
func (m *Mirror) token(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		return &problem{http.StatusMethodNotAllowed, codeUnsupported, r.Method + ": tokens are got with GET or POST"}
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		return &problem{http.StatusBadRequest, codeUnsupported, "not a form of at most 64 KiB"} // the error could hold the secret
	}
	var cred image.Credential
	if user, secret, ok := r.BasicAuth(); ok {
		cred = image.Credential{Username: user, Secret: secret}
	}
	switch r.PostForm.Get("grant_type") {
	case "password":
		cred = image.Credential{Username: r.PostForm.Get("username"), Secret: r.PostForm.Get("password")}
	case "refresh_token":
		cred = image.Credential{Secret: r.PostForm.Get("refresh_token")}
	}
	host := strings.ToLower(r.Form.Get("service"))
	name := ""
	for _, list := range r.Form["scope"] {
		for scope := range strings.FieldsSeq(list) {
			p := strings.SplitN(scope, ":", 3)
			if len(p) == 3 && p[0] == "repository" && len(p[1]) <= maxRepo && repoRE.MatchString(p[1]) && name == "" {
				name = host + "/" + p[1]
			}
		}
	}
	if !hostRE.MatchString(host) || name == "" {
		return &problem{http.StatusBadRequest, codeNameInvalid, "a token is for one repository: scope=repository:NAME:pull, service=REGISTRY"}
	}
	word := m.tokens.add(grant{name: name, cred: cred}, m.now())
	body, err := json.Marshal(map[string]any{
		"token": word, "access_token": word, "expires_in": int(tokenLife.Seconds()), "issued_at": m.now().UTC().Format(time.RFC3339),
	})
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(body) // the client may have gone
	return nil
}

// credential is that of the pull that a request belongs to. Without a token it is
// an error that says where to get one.
func (m *Mirror) credential(r *http.Request, t target) (image.Credential, error) {
	word, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return image.Credential{}, &challenge{target: t}
	}
	g, ok := m.tokens.find(word, m.now())
	if !ok || g.name != t.name {
		return image.Credential{}, &challenge{target: t, why: "invalid_token"}
	}
	return g.cred, nil
}

// challenge is an answer of 401: get a token, or, with why, leave it.
//
// containerd takes a refused token as the least of all errors: whatever the next
// host says of the image, it shows that, unless it is a refusal, too.
type challenge struct {
	target target
	why    string
}

func (c *challenge) Error() string {
	if c.why == "" {
		return "no token: /token gives one, with the pull's credential or without a credential"
	}
	return c.why
}

// header is WWW-Authenticate's value.
func (c *challenge) header(r *http.Request) string {
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	host, repo, _ := strings.Cut(c.target.name, "/")
	v := fmt.Sprintf(`Bearer realm="%s://%s/token",service="%s",scope="repository:%s:pull"`, scheme, r.Host, host, repo)
	if c.why != "" {
		v += fmt.Sprintf(`,error="%s"`, c.why)
	}
	return v
}
