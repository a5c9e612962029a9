package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// authorizer is containerd's, held to two rules that it does not have: no
// credential goes to a token server over plain HTTP on the word of a registry
// that was reached over TLS, and a password that was refused is not tried again
// (five times, which locks accounts).
type authorizer struct {
	docker.Authorizer
	redirects
}

// AddResponses implements docker.Authorizer.
func (a authorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	last := responses[len(responses)-1]
	if strings.HasPrefix(last.Request.Header.Get("Authorization"), "Basic ") {
		return fmt.Errorf("user name and password refused: %w", docker.ErrInvalidAuthorization)
	}
	for _, c := range auth.ParseAuthHeader(last.Header) {
		if c.Scheme != auth.BearerAuth {
			continue
		}
		realm, err := url.Parse(c.Parameters["realm"])
		if err != nil {
			return fmt.Errorf("unreadable token server address: %w", docker.ErrInvalidAuthorization)
		}
		if a.scheme(last.Request.URL) == "https" && realm.Scheme != "https" && !loopback(realm.Hostname()) {
			return &Error{Host: last.Request.URL.Host, Status: last.StatusCode, kind: blockdev.ErrUnauthorized,
				text: "its token server does not use https, so no credential is sent there"}
		}
	}
	err := a.Authorizer.AddResponses(ctx, responses)
	if err != nil && redirected(last.Request) {
		return storageRefuses(last.Request, last.StatusCode)
	}
	return err
}

// credentialFor returns the function with which containerd's authorizer asks for
// credentials. Only the registry itself gets one: the reference's host, or what
// stands for it (docker.io's API server, and the server that a hosts.toml names
// as this registry). Mirrors and targets of redirects get none.
func credentialFor(cred image.Credential, registry, server string) func(string) (string, string, error) {
	return func(host string) (string, string, error) {
		if strings.EqualFold(host, server) || strings.EqualFold(host, registry) ||
			registry == "docker.io" && host == "registry-1.docker.io" {
			return cred.Username, cred.Secret, nil
		}
		return "", "", nil
	}
}

// CredentialHash names a credential without holding it, for the keys of caches
// that live in memory. It is empty for anonymous access. It must not be stored
// or logged: weak passwords can be guessed from it.
func CredentialHash(c image.Credential) string {
	if c == (image.Credential{}) {
		return ""
	}
	h := sha256.New()
	fmt.Fprintf(h, "%d:%s%s", len(c.Username), c.Username, c.Secret)
	return hex.EncodeToString(h.Sum(nil))
}
