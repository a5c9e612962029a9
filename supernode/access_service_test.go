package supernode

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestPrivate: a private image is for those whom the registry lets in, stored or
// not.
func TestPrivate(t *testing.T) {
	for _, a := range []registrytest.Auth{registrytest.Basic, registrytest.Bearer} {
		f := registrytest.NewFake(t)
		l := registrytest.GzipLayer(t, "secret", 1000, 1)
		f.Push(t, "private/app", "v1", l)
		f.SetAuth(a, users, onlyAliceReads)
		var logs logBuffer
		s := start(t, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&logs, nil)) })
		_, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "private/app:v1", nobody))
		wantErr(t, err, blockdev.ErrUnauthorized, "private/app:v1")
		img, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "private/app:v1", alice))
		if err != nil {
			t.Fatal(err)
		}
		wantImage(t, s, img, l)
		for _, c := range []image.Credential{nobody, {Username: alice.Username, Secret: "guess"}} {
			_, err = s.FetchIndexesFor(t.Context(), "q", request(f.Target, "private/app:v1", c))
			wantErr(t, err, blockdev.ErrUnauthorized)
		}
		// By digest, and under the name of a repository that is open to all.
		req := request(f.Target, "private/app:v1", nobody)
		req.Manifest = img.Manifest
		_, err = s.FetchIndexesFor(t.Context(), "q", req)
		wantErr(t, err, blockdev.ErrUnauthorized)
		f.Push(t, "open/app", "v1", registrytest.GzipLayer(t, "x", 10, 9))
		f.SetAuth(a, users, func(u, repo string) bool { return u == alice.Username || strings.HasPrefix(repo, "open/") })
		if _, err = s.FetchIndexesFor(t.Context(), "q", request(f.Target, "open/app:v1", nobody)); err != nil {
			t.Fatal(err)
		}
		req = request(f.Target, "open/app:v1", nobody)
		req.Manifest = img.Manifest
		_, err = s.FetchIndexesFor(t.Context(), "q", req)
		wantErr(t, err, blockdev.ErrNotFound)
		if strings.Contains(logs.String(), alice.Secret) {
			t.Error("the log holds the secret")
		}
	}
}

// TestExpiredCredentialForPublic: a node's stale credential does not keep it from
// an image that anybody may have.
func TestExpiredCredentialForPublic(t *testing.T) {
	f := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "a", 1000, 1)
	f.Push(t, "app", "v1", l)
	f.SetAuth(registrytest.Bearer, users, func(string, string) bool { return true })
	img, err := start(t).FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", image.Credential{Username: "alice", Secret: "expired"}))
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Layers) != 1 {
		t.Error("no layers")
	}
}

// TestOrigins: that another registry lists a layer's digest opens nothing, unless
// it really has the layer, or is trusted.
func TestOrigins(t *testing.T) {
	mine, other := registrytest.NewFake(t), registrytest.NewFake(t)
	secret := registrytest.GzipLayer(t, "secret", 50_000, 1)
	mine.Push(t, "private/app", "v1", secret)
	mine.SetAuth(registrytest.Basic, users, onlyAliceReads)
	// A hostile registry lists the layer without having it.
	other.Push(t, "bait", "v1", secret)
	other.SetBlob("bait", blockdev.Sum(secret.Blob), nil)

	dir := filepath.Join(t.TempDir(), "data")
	t.Run("listed, not there", func(t *testing.T) {
		s := start(t, at(dir))
		if _, err := s.FetchIndexesFor(t.Context(), "owner", request(mine.Target, "private/app:v1", alice)); err != nil {
			t.Fatal(err)
		}
		_, err := s.FetchIndexesFor(t.Context(), "thief", request(other.Target, "bait:v1", nobody))
		wantErr(t, err, blockdev.ErrNotFound, "bait:v1", blockdev.Sum(secret.Blob).String())
		req := request(other.Target, "bait:v1", nobody)
		req.Have = []blockdev.Digest{blockdev.Sum(secret.Blob)}
		_, err = s.FetchIndexesFor(t.Context(), "thief", req)
		wantErr(t, err, blockdev.ErrNotFound)
	})
	t.Run("other bytes there", func(t *testing.T) {
		other.SetBlob("bait", blockdev.Sum(secret.Blob), bytes.Repeat([]byte{1}, len(secret.Blob)))
		s := start(t, at(dir))
		for range 3 {
			other.Forget()
			_, err := s.FetchIndexesFor(t.Context(), "thief", request(other.Target, "bait:v1", nobody))
			wantErr(t, err, blockdev.ErrCorrupt, other.Host)
		}
		if n := len(other.Requests("/blobs/" + blockdev.Sum(secret.Blob).String())); n != 0 {
			t.Error("a layer that is known to be wrong was fetched again")
		}
	})
	t.Run("another DiffID", func(t *testing.T) {
		// The thief's own layer, with a config that claims the secret's DiffID.
		own := registrytest.GzipLayer(t, "own", 100, 5)
		own.DiffID = secret.DiffID
		other.Push(t, "bait", "v2", own)
		s := start(t, at(dir))
		_, err := s.FetchIndexesFor(t.Context(), "thief", request(other.Target, "bait:v2", nobody))
		wantErr(t, err, blockdev.ErrCorrupt, "bait:v2")
	})
	t.Run("really there", func(t *testing.T) {
		other.SetBlob("bait", blockdev.Sum(secret.Blob), secret.Blob)
		s := start(t, at(dir))
		for range 2 {
			other.Forget()
			var stages []image.Stage
			err := warm(t, s, request(other.Target, "bait:v1", nobody), func(p image.Progress) { stages = append(stages, p.Stage) })
			if err != nil {
				t.Fatal(err)
			}
			if last := stages[len(stages)-1]; last != image.StageStored {
				t.Errorf("stages %v", stages)
			}
		}
		if n := len(other.Requests("/blobs/" + blockdev.Sum(secret.Blob).String())); n != 0 {
			t.Error("proven once, but asked again")
		}
		// The first registry still counts, and its images are still private.
		if _, err := s.FetchIndexesFor(t.Context(), "owner", request(mine.Target, "private/app:v1", alice)); err != nil {
			t.Error(err)
		}
		_, err := s.FetchIndexesFor(t.Context(), "thief", request(mine.Target, "private/app:v1", nobody))
		wantErr(t, err, blockdev.ErrUnauthorized)
	})
	t.Run("trusted", func(t *testing.T) {
		other := registrytest.NewFake(t)
		other.Push(t, "bait", "v1", secret)
		s := start(t, at(dir), trust(strings.ToUpper(other.Host)))
		other.SetBlob("bait", blockdev.Sum(secret.Blob), nil)
		_, err := s.FetchIndexesFor(t.Context(), "p", request(other.Target, "bait:v1", nobody))
		wantErr(t, err, blockdev.ErrNotFound, "bait:v1")
		// It has to say that it has the layer; that it sends it is not waited for.
		other.SetBlob("bait", blockdev.Sum(secret.Blob), secret.Blob)
		other.Forget()
		img, err := s.FetchIndexesFor(t.Context(), "p", request(other.Target, "bait:v1", nobody))
		if err != nil {
			t.Fatal(err)
		}
		wantImage(t, s, img, secret)
		if n := len(other.Requests("GET", "/blobs/"+blockdev.Sum(secret.Blob).String())); n != 0 {
			t.Error("fetched from a registry that is trusted")
		}
	})
}

// TestRegistryDown: what is stored keeps starting, also after a restart; what is
// not gives a clear error.
func TestRegistryDown(t *testing.T) {
	f := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "a", 1000, 1)
	f.Push(t, "app", "v1", l)
	f.Push(t, "app", "v2", registrytest.GzipLayer(t, "b", 1000, 2))
	f.SetAuth(registrytest.Basic, users, onlyAliceReads)
	dir := filepath.Join(t.TempDir(), "data")
	quick := func(c *Config) { c.Dir = dir; c.AccessTTL = time.Nanosecond; c.Registry.TagTTL = time.Nanosecond }
	s, err := New(func() Config { c := Config{}; quick(&c); return c }())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", alice)); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	f.Close()
	s = start(t, quick)
	img, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", alice))
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, s, img, l)
	_, err = s.FetchIndexesFor(t.Context(), "q", request(f.Target, "app:v1", alice))
	wantErr(t, err, blockdev.ErrUnavailable, f.Host)
	_, err = s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v2", alice))
	wantErr(t, err, blockdev.ErrUnavailable, f.Host)
}

// TestMirrorFails: if a mirror in hosts.toml is down, refuses or has no copy, then the registry
// decides: those that it lets in get the image, those that it refuses do not, also those that it let
// in before; and while it is down, too, the grace counts.
func TestMirrorFails(t *testing.T) {
	for what, odd := range map[string]registrytest.Odd{
		"down":    nil,
		"404":     registrytest.Status(http.StatusNotFound),
		"401":     registrytest.Status(http.StatusUnauthorized),
		"limited": registrytest.Status(http.StatusTooManyRequests, "Retry-After", "100"),
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			f, mirror := registrytest.NewFake(t), registrytest.NewFake(t)
			l := registrytest.GzipLayer(t, "a", 1000, 1)
			f.Push(t, "app", "v1", l)
			f.SetAuth(registrytest.Basic, users, onlyAliceReads)
			if odd == nil {
				mirror.Close()
			} else {
				mirror.Script(odd)
			}
			dirs := t.TempDir()
			if err := os.Mkdir(filepath.Join(dirs, "registry.example"), 0o755); err != nil {
				t.Fatal(err)
			}
			hosts := fmt.Appendf(nil, "server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", f.Host, mirror.Host)
			if err := os.WriteFile(filepath.Join(dirs, "registry.example", "hosts.toml"), hosts, 0o644); err != nil {
				t.Fatal(err)
			}
			now := newClock()
			s := start(t, now.use, func(c *Config) { c.Registry.TagTTL, c.HostDirs = time.Nanosecond, []string{dirs} })
			ask := func(cred image.Credential) error {
				now.pass(time.Hour) // no answer is believed for so long
				img, err := s.FetchIndexesFor(t.Context(), "p", image.Request{Ref: "registry.example/app:v1", Platform: amd64, Credential: cred})
				if err == nil {
					wantImage(t, s, img, l)
				}
				return err
			}
			if err := ask(alice); err != nil {
				t.Fatalf("the registry lets it in: %v", err)
			}
			wantErr(t, ask(nobody), blockdev.ErrUnauthorized)
			f.SetHook(registrytest.Status(http.StatusServiceUnavailable, "Retry-After", "100"))
			if err := ask(alice); err != nil {
				t.Errorf("the registry let it in before it was down: %v", err)
			}
			f.SetHook(nil)
			f.SetAuth(registrytest.Basic, users, func(string, string) bool { return false })
			wantErr(t, ask(alice), blockdev.ErrUnauthorized)
			f.Close()
			wantErr(t, ask(alice), blockdev.ErrUnavailable)
		})
	}
}
