package registry_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/plugins/content/local"
	ctrlog "github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/semaphore"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	rt "github.com/shoalfs/shoal/internal/registry/registrytest"
)

// containerdPulls is what containerd does with an image: it resolves the name,
// fetches all that belongs to the image into a content store, and checks it there.
func containerdPulls(t *testing.T, ref string, dirs []string, cred image.Credential) error {
	t.Helper()
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	ctx, cancel := context.WithTimeout(ctrlog.WithLogger(t.Context(), logrus.NewEntry(quiet)), 30*time.Second)
	defer cancel()
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var pools []*http.Transport
	defer func() {
		for _, p := range pools {
			p.CloseIdleConnections()
		}
	}()
	opts := config.HostOptions{
		UpdateClient: func(c *http.Client) error {
			if p, ok := c.Transport.(*http.Transport); ok {
				pools = append(pools, p)
			}
			return nil
		},
		Credentials: func(string) (string, string, error) { return cred.Username, cred.Secret, nil },
	}
	if len(dirs) > 0 {
		opts.HostDir = config.HostDirFromRoot(dirs[0])
	}
	res := docker.NewResolver(docker.ResolverOptions{Hosts: config.ConfigureHosts(ctx, opts)})
	name, desc, err := res.Resolve(ctx, ref)
	if err != nil {
		return err
	}
	fetcher, err := res.Fetcher(ctx, name)
	if err != nil {
		return err
	}
	one := semaphore.NewWeighted(1) // its authorizer has a data race where several requests want a token
	return images.Dispatch(ctx, images.Handlers(remotes.FetchHandler(store, fetcher), images.ChildrenHandler(content.Provider(store))), one, desc)
}

// shoalPulls is what a supernode does with it.
func shoalPulls(t *testing.T, ref string, dirs []string, cred image.Credential) error {
	t.Helper()
	c := newClient(t, func(cfg *registry.Config) { cfg.HostDirs = dirs })
	m, err := c.Resolve(t.Context(), image.Request{Ref: ref, Platform: amd64, Credential: cred})
	if err != nil {
		return err
	}
	for i, l := range m.Layers {
		b, err := fetch(t.Context(), c, m, i, cred, 0)
		for try := 0; try < 3 && errors.Is(err, blockdev.ErrUnavailable); try++ {
			// As package ingest does it: from where the connection broke.
			var more []byte
			more, err = fetch(t.Context(), c, m, i, cred, int64(len(b)))
			b = append(b, more...)
		}
		if err != nil {
			return err
		}
		if blockdev.Sum(b) != l.Digest {
			return errors.New("a layer has another digest")
		}
		if err := c.HasBlob(t.Context(), m, l, cred); err != nil && !registry.Downgraded(err) {
			return fmt.Errorf("pulled, but the repository is said not to have it: %w", err)
		}
	}
	for _, d := range []blockdev.Digest{{}, m.Digest} {
		if err := c.Check(t.Context(), ref, d, cred); err != nil {
			return fmt.Errorf("pulled, but the repository is said to be closed: %w", err)
		}
	}
	return nil
}

// odd is a place for an image, and for what is odd about the way to it.
type odd struct {
	*testing.T
	reg, other *rt.Fake // the image is at reg; other has its blobs, too
	layer      rt.Layer
	ref        string
	dirs       []string
	cred       image.Credential
}

func (o *odd) blob() string { return "/blobs/" + blockdev.Sum(o.layer.Blob).String() }

func (o *odd) hosts(host, format string, args ...any) {
	o.dirs = []string{hostsToml(o.T, host, fmt.Sprintf(format, args...))}
}

// image is what names the layer.
func (o *odd) image() (cfg, manifest []byte) {
	cfg = rt.Config(o.T, rt.Platform{OS: "linux", Architecture: "amd64"}, o.layer)
	return cfg, rt.Manifest(o.T, rt.TypeManifest, cfg, o.layer)
}

// manifest has it sent with this length (rt.Blob.Length), and with its digest or without.
func (o *odd) manifest(method string, digest bool, length int) rt.Odd {
	_, m := o.image()
	return rt.On(method, "/manifests/", func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", rt.TypeManifest)
		if digest {
			w.Header().Set("Docker-Content-Digest", blockdev.Sum(m).String())
		}
		return rt.Blob{Data: m, Length: length}.Serve(w, r)
	})
}

// expires ends what a request for the layer is let in by, and then its connection, once.
func (o *odd) expires() rt.Odd {
	cut := rt.Times(1, func(w http.ResponseWriter, r *http.Request) bool {
		o.reg.Expire()
		return rt.Blob{Data: o.layer.Blob, Cut: 100_000}.Serve(w, r)
	})
	return rt.On("GET", o.blob(), func(w http.ResponseWriter, r *http.Request) bool {
		return r.Header.Get("Authorization") != "" && cut(w, r)
	})
}

// onIPv6 makes reg one that is reached over IPv6.
func (o *odd) onIPv6() {
	o.reg = rt.NewFakeAt(o.T, "[::1]:0")
	o.reg.Push(o.T, "app", "v1", o.layer)
}

// over makes reg one that speaks TLS.
func (o *odd) over(f *rt.Fake) {
	cfg, m := o.image()
	f.SetManifest("app", "v1", rt.TypeManifest, blockdev.Sum(m), m)
	f.SetBlob("app", blockdev.Sum(cfg), cfg)
	f.SetBlob("app", blockdev.Sum(o.layer.Blob), o.layer.Blob)
	o.reg = f
}

// notLoopback is another name of this machine's for a fake: one that nobody takes
// for loopback, where plain HTTP needs no permission.
func notLoopback(f *rt.Fake) string {
	return "http://" + strings.Replace(f.Host, "127.0.0.1", "0.0.0.0", 1)
}

// TestContainerdIsJudge: what containerd pulls from odd registries, shoal pulls;
// what containerd refuses, shoal refuses, and says why.
func TestContainerdIsJudge(t *testing.T) {
	for _, tc := range []struct {
		name string
		set  func(o *odd)
		// refused: by both, and shoal's error has these words in it.
		refused []string
		// stricter: containerd pulls, shoal refuses knowingly, with these words.
		stricter []string
		// looser: containerd refuses, shoal pulls: what comes is what the digest says.
		looser bool
		not    string // a word that would send the operator the wrong way
	}{
		{name: "plain", set: func(*odd) {}},
		{name: "by digest", set: func(o *odd) { o.ref = o.reg.Host + "/app@" + o.reg.Push(o.T, "app", "v1", o.layer).String() }},
		{name: "tag and digest, the tag has moved", set: func(o *odd) {
			d := o.reg.Push(o.T, "app", "v1", o.layer)
			o.reg.Push(o.T, "app", "v1", rt.GzipLayer(o.T, "moved", 10, 9))
			o.ref += "@" + d.String()
		}},
		{name: "basic", set: func(o *odd) { o.reg.SetAuth(rt.Basic, users, onlyAlice); o.cred = alice }},
		{name: "bearer", set: func(o *odd) { o.reg.SetAuth(rt.Bearer, users, onlyAlice); o.cred = alice }},
		{name: "a token that expires in the middle of a layer", set: func(o *odd) {
			o.reg.SetAuth(rt.Bearer, users, onlyAlice)
			o.cred = alice
			o.reg.Script(o.expires())
		}},
		{name: "a token that expires in the middle of a layer, and no other", set: func(o *odd) {
			o.reg.SetAuth(rt.Bearer, users, onlyAlice)
			o.cred = alice
			o.reg.Script(o.expires(), rt.On("", "/token", func(w http.ResponseWriter, r *http.Request) bool {
				return o.reg.Expired() && rt.Status(401)(w, r)
			}))
		}, refused: []string{"401", "denied"}},
		{name: "no credential", set: func(o *odd) { o.reg.SetAuth(rt.Basic, users, onlyAlice) }, refused: []string{"credential"}},
		{name: "bearer, no credential", set: func(o *odd) { o.reg.SetAuth(rt.Bearer, users, onlyAlice) }, refused: []string{"denied"}},
		{name: "404", set: func(o *odd) { o.ref = o.reg.Host + "/app:none" }, refused: []string{"not found"}},
		{name: "403", set: func(o *odd) { o.reg.Script(rt.Status(403)) }, refused: []string{"403"}},
		{name: "429 for long", set: func(o *odd) { o.reg.Script(rt.Status(429, "Retry-After", "7")) }, refused: []string{"429", "7s"}},
		{name: "429 once", set: func(o *odd) { o.reg.Script(rt.Times(1, rt.Status(429, "Retry-After", "1"))) }},
		{name: "429 once for a layer", set: func(o *odd) { o.reg.Script(rt.On("GET", o.blob(), rt.Times(1, rt.Status(429)))) }},
		{name: "500 once", set: func(o *odd) { o.reg.Script(rt.Times(1, rt.Status(500))) }},
		{name: "503 once for a layer", set: func(o *odd) { o.reg.Script(rt.On("GET", o.blob(), rt.Times(1, rt.Status(503)))) }},

		{name: "429 once for a layer, with Retry-After", set: func(o *odd) {
			o.reg.Script(rt.On("GET", o.blob(), rt.Times(1, rt.Status(429, "Retry-After", "1"))))
		}},
		{name: "404 for a layer", set: func(o *odd) { o.reg.Script(rt.On("", o.blob(), rt.Status(404))) }, refused: []string{"not found"}},
		{name: "403 for a layer", set: func(o *odd) { o.reg.Script(rt.On("", o.blob(), rt.Status(403))) }, refused: []string{"403"}},
		{name: "401 for a layer", set: func(o *odd) { o.reg.Script(rt.On("", o.blob(), rt.Status(401))) }, refused: []string{"401"}},
		{name: "429 for a layer, for long", set: func(o *odd) {
			o.reg.Script(rt.On("GET", o.blob(), rt.Status(429, "Retry-After", "7")))
		}, refused: []string{"429", "7s"}},

		{name: "no HEAD", set: func(o *odd) { o.reg.Script(rt.On("HEAD", "", rt.Status(405))) }},
		{name: "HEAD of blobs forbidden", set: func(o *odd) { o.reg.Script(rt.On("HEAD", "/blobs/", rt.Status(403))) }},
		{name: "HEAD of blobs unknown", set: func(o *odd) { o.reg.Script(rt.On("HEAD", "/blobs/", rt.Status(404))) }},
		{name: "HEAD of manifests forbidden", set: func(o *odd) { o.reg.Script(rt.On("HEAD", "/manifests/", rt.Status(403))) }, refused: []string{"403"}},
		{name: "HEAD of manifests leads to a URL signed for GET", set: func(o *odd) {
			o.other.Push(o.T, "app", "v1", o.layer)
			o.reg.Script(rt.On("", "/manifests/", rt.RedirectTo("http://"+o.other.Host)))
			o.other.Script(rt.On("HEAD", "", rt.Status(403)))
		}, refused: []string{"403", "redirects there"}, not: "credential"},
		{name: "HEAD of blobs leads to a URL signed for GET", set: func(o *odd) {
			o.reg.Script(rt.On("", o.blob(), rt.RedirectTo("http://"+o.other.Host)))
			o.other.Script(rt.On("HEAD", "", rt.Status(403)))
		}},
		{name: "no digest and no length of a manifest", set: func(o *odd) { o.reg.Script(o.manifest("", false, -1)) }},
		{name: "a manifest of no digest that is too short", set: func(o *odd) { o.reg.Script(o.manifest("", false, 100)) }, refused: []string{"not readable JSON"}},
		{name: "a manifest of no digest that is said to be too long", set: func(o *odd) { o.reg.Script(o.manifest("", false, 100_000)) }, refused: []string{"unexpected EOF"}},
		{name: "a manifest of no digest of which HEAD says a wrong length", set: func(o *odd) { o.reg.Script(o.manifest("HEAD", false, 100)) }},
		{name: "no length of a manifest", set: func(o *odd) { o.reg.Script(o.manifest("", true, -1)) }},
		{name: "no length of a manifest at GET", set: func(o *odd) { o.reg.Script(o.manifest("GET", true, -1)) }},
		{name: "a manifest that is too short", set: func(o *odd) { o.reg.Script(o.manifest("", true, 100)) }, refused: []string{"another digest"}},
		{name: "a manifest that is said to be too long", set: func(o *odd) { o.reg.Script(o.manifest("", true, 100_000)) }, looser: true},
		{name: "a manifest that is too short at GET", set: func(o *odd) { o.reg.Script(o.manifest("GET", true, 100)) }, refused: []string{"another digest"}},
		{name: "a manifest that is said to be too long at GET", set: func(o *odd) { o.reg.Script(o.manifest("GET", true, 100_000)) }},
		{name: "a manifest that is said to be too long at HEAD", set: func(o *odd) { o.reg.Script(o.manifest("HEAD", true, 100_000)) }, looser: true},
		{name: "a manifest that is said to be too short at HEAD", set: func(o *odd) { o.reg.Script(o.manifest("HEAD", true, 100)) }, looser: true},

		{name: "storage behind a redirect", set: func(o *odd) { o.reg.Script(rt.On("GET", o.blob(), rt.RedirectTo("http://"+o.other.Host))) }},
		{name: "storage that wants a Referer", set: func(o *odd) {
			o.hosts("registry.example", "server = \"http://%s\"\n", o.reg.Host) // by fallback, net/http sends none
			o.ref = "registry.example/app:v1"
			o.reg.Script(rt.On("", o.blob(), rt.RedirectTo("http://"+o.other.Host)))
			o.other.Script(rt.WantReferer(o.reg.Host))
		}},
		{name: "storage that wants another Referer", set: func(o *odd) {
			o.reg.Script(rt.On("", o.blob(), rt.RedirectTo("http://"+o.other.Host)))
			o.other.Script(rt.WantReferer("another.example"))
		}, refused: []string{"401", "redirects there", o127}, not: "credential"},
		{name: "storage that refuses", set: func(o *odd) {
			o.reg.Script(rt.On("", o.blob(), rt.RedirectTo("http://"+o.other.Host)))
			o.other.Script(rt.Status(403))
		}, refused: []string{"403", "redirects there"}, not: "credential"},
		{name: "redirects in a circle", set: func(o *odd) { o.reg.Script(rt.On("", o.blob(), rt.RedirectTo("http://"+o.reg.Host))) }, refused: []string{"redirects"}},
		{name: "https to http storage", set: func(o *odd) {
			o.over(rt.NewFakeTLS(o.T))
			o.hosts("registry.example", "server = \"https://%s\"\nskip_verify = true\n", o.reg.Host)
			o.ref = "registry.example/app:v1"
			o.reg.Script(rt.On("", o.blob(), rt.RedirectTo(notLoopback(o.other))))
		}},
		{name: "https to http for manifests", set: func(o *odd) {
			o.over(rt.NewFakeTLS(o.T))
			o.other.Push(o.T, "app", "v1", o.layer)
			o.hosts("registry.example", "server = \"https://%s\"\nskip_verify = true\n", o.reg.Host)
			o.ref = "registry.example/app:v1"
			o.reg.Script(rt.On("", "/manifests/", rt.RedirectTo(notLoopback(o.other))))
		}, stricter: []string{"redirects from https to http"}},
		{name: "http by fallback, to http storage", set: func(o *odd) { o.reg.Script(rt.On("", o.blob(), rt.RedirectTo(notLoopback(o.other)))) }},
		{name: "http by fallback, with a token server there", set: func(o *odd) {
			o.reg.SetAuth(rt.Bearer, users, onlyAlice)
			o.cred = alice
			o.hosts("registry.example", "server = %q\nskip_verify = true\n", notLoopback(o.reg))
			o.ref = "registry.example/app:v1"
		}},
		{name: "http by hosts.toml, to http storage", set: func(o *odd) {
			o.hosts("registry.example", "server = %q\n", notLoopback(o.reg))
			o.ref = "registry.example/app:v1"
			o.reg.Script(rt.On("", o.blob(), rt.RedirectTo(notLoopback(o.other))))
		}},
		{name: "an unknown certificate", set: func(o *odd) {
			o.over(rt.NewFakeTLS(o.T))
			o.hosts("registry.example", "server = \"https://%s\"\n", o.reg.Host)
			o.ref = "registry.example/app:v1"
		}, refused: []string{"certificate"}},

		{name: "connections that break", set: func(o *odd) { o.reg.Script(rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, Cut: 100_000}.Serve)) }},
		{name: "a connection that breaks, and no ranges", set: func(o *odd) {
			o.reg.Script(rt.On("GET", o.blob(), rt.Times(1, rt.Blob{Data: o.layer.Blob, Cut: 100_000}.Serve)), rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, NoRanges: true}.Serve))
		}},
		{name: "signed URLs that are good for a moment", set: func(o *odd) {
			o.reg.Script(rt.On("", o.blob(), rt.RedirectTo("http://"+o.other.Host)))
			o.other.Script(rt.SignedOnce(), rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, Cut: 100_000}.Serve))
		}},
		{name: "no length of a layer", set: func(o *odd) { o.reg.Script(rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, Length: -1}.Serve)) }},
		{name: "a layer that is too short", set: func(o *odd) {
			o.reg.Script(rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, Length: 1000, NoRanges: true}.Serve))
		}, refused: []string{"bytes before the end"}},
		{name: "a layer that is said to be too long", set: func(o *odd) {
			o.reg.Script(rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, Length: len(o.layer.Blob) + 10, NoRanges: true}.Serve))
		}},
		{name: "a layer labelled as compressed once more", set: func(o *odd) {
			o.reg.Script(rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, Encoding: "gzip"}.Serve))
		}, refused: []string{"content encoding", "gzip"}},
		{name: "an unknown content encoding", set: func(o *odd) {
			o.reg.Script(rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, Encoding: "aws-chunked"}.Serve))
		}, refused: []string{"content encoding", "aws-chunked"}},

		{name: "a mirror that is down", set: func(o *odd) { o.mirror("http://127.0.0.1:1") }},
		{name: "a mirror without the image", set: func(o *odd) { o.mirror("http://" + rt.NewFake(o.T).Host) }},
		{name: "a mirror that breaks", set: func(o *odd) { o.mirror("http://" + o.other.Host); o.other.Script(rt.Status(500)) }},
		{name: "a mirror that refuses", set: func(o *odd) { o.mirror("http://" + o.other.Host); o.other.Script(rt.Status(403)) }},
		{name: "a mirror that limits", set: func(o *odd) {
			o.mirror("http://" + o.other.Host)
			o.other.Script(rt.Status(429, "Retry-After", "100"))
		}},
		{name: "a mirror with a short layer", set: func(o *odd) {
			o.mirror("http://" + o.other.Host)
			o.other.Script(rt.On("GET", o.blob(), rt.Blob{Data: o.layer.Blob, Length: 1000, NoRanges: true}.Serve))
		}, refused: []string{"bytes before the end"}},
		{name: "a mirror without a layer", set: func(o *odd) {
			o.mirror("http://" + o.other.Host)
			o.other.Script(rt.On("", o.blob(), rt.Status(404)))
		}},
		{name: "a mirror that ends in the middle of a layer", set: func(o *odd) {
			o.mirror("http://" + o.other.Host)
			o.other.Script(rt.On("GET", o.blob(), rt.Times(1, rt.Blob{Data: o.layer.Blob, Cut: 100_000}.Serve)), rt.On("", o.blob(), rt.Status(503)))
		}},
		{name: "a mirror that limits for a layer", set: func(o *odd) {
			o.mirror("http://" + o.other.Host)
			o.other.Script(rt.On("", o.blob(), rt.Status(429, "Retry-After", "100")))
		}},
		{name: "a mirror that answers everything with a page", set: func(o *odd) {
			o.mirror("http://" + o.other.Host)
			o.other.Script(func(w http.ResponseWriter, r *http.Request) bool {
				w.Header().Set("Content-Type", "text/html")
				return rt.Blob{Data: []byte("<html>sign in</html>"), Length: -1}.Serve(w, r)
			})
		}, stricter: []string{"web page"}}, // containerd takes the page for the image, and fails when it unpacks it
		{name: "a mirror below a path", set: func(o *odd) {
			o.reg.Push(o.T, "proxy/example/app", "v1", o.layer)
			o.ref = "registry.example/app:v1"
			o.hosts("registry.example", "server = \"http://127.0.0.1:1\"\n[host.\"http://%s/v2/proxy/example\"]\ncapabilities = [\"pull\", \"resolve\"]\noverride_path = true\n", o.reg.Host)
		}},
		{name: "upper case in the host", set: func(o *odd) {
			o.hosts("Registry.Example:5000", "server = \"http://%s\"\n", o.reg.Host)
			o.ref = "Registry.Example:5000/app:v1"
		}},
		{name: "upper case in the host, in containerd's other form", set: func(o *odd) {
			o.hosts("Registry.Example_5000_", "server = \"http://%s\"\n", o.reg.Host)
			o.ref = "Registry.Example:5000/app:v1"
		}},
		{name: "a registry at an IPv6 literal", set: func(o *odd) {
			o.onIPv6()
			o.ref = o.reg.Host + "/app:v1"
		}},
		{name: "a registry at an IPv6 literal, by hosts.toml", set: func(o *odd) {
			o.onIPv6()
			o.hosts("registry.example", "server = \"http://127.0.0.1:1\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", o.reg.Host)
			o.ref = "registry.example/app:v1"
		}},
		{name: "a registry at an IPv6 literal, with a token server there", set: func(o *odd) {
			o.onIPv6()
			o.reg.SetAuth(rt.Bearer, users, onlyAlice)
			o.cred = alice
			o.ref = o.reg.Host + "/app:v1"
		}},
		{name: "a registry at an IPv6 literal, and storage at another", set: func(o *odd) {
			o.onIPv6()
			o.reg.SetAuth(rt.Basic, users, onlyAlice)
			o.cred = alice
			o.other = rt.NewFakeAt(o.T, "[::1]:0")
			o.other.SetBlob("app", blockdev.Sum(o.layer.Blob), o.layer.Blob)
			o.reg.Script(rt.On("GET", o.blob(), rt.RedirectTo("http://"+o.other.Host)))
			o.ref = o.reg.Host + "/app:v1"
		}},
		{name: "an IPv6 literal", set: func(o *odd) {
			o.hosts("[2001:db8::1]_5000_", "server = \"http://%s\"\n", o.reg.Host)
			o.ref = "[2001:db8::1]:5000/app:v1"
		}},
		{name: "a client certificate", set: func(o *odd) {
			f := rt.NewFakeTLS(o.T, func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert })
			o.over(f)
			cert, key := keyPair(o.T)
			o.hosts("registry.example", "server = \"https://%s\"\nskip_verify = true\nclient = [[%q, %q]]\n", f.Host, cert, key)
			o.ref = "registry.example/app:v1"
		}},
		{name: "a client certificate that is missing", set: func(o *odd) {
			f := rt.NewFakeTLS(o.T, func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert })
			o.over(f)
			o.hosts("registry.example", "server = \"https://%s\"\nskip_verify = true\n", f.Host)
			o.ref = "registry.example/app:v1"
		}, refused: []string{"certificate"}},
		{name: "a manifest named by SHA-512", set: func(o *odd) { o.ref = o.reg.Host + "/app@sha512:" + strings.Repeat("0", 128) }, refused: []string{"sha512"}},
		{name: "SHA-512", set: func(o *odd) {
			cfg := rt.Config(o.T, rt.Platform{OS: "linux", Architecture: "amd64"}, o.layer)
			m := []byte(strings.Replace(string(rt.Manifest(o.T, rt.TypeManifest, cfg, o.layer)), blockdev.Sum(o.layer.Blob).String(), "sha512:"+strings.Repeat("0", 128), 1))
			o.reg.SetManifest("app", "v1", rt.TypeManifest, blockdev.Sum(m), m)
		}, refused: []string{"sha512"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			newOdd := func() *odd {
				o := &odd{T: t, reg: rt.NewFake(t), other: rt.NewFake(t), layer: rt.GzipLayer(t, "file", 300_000, 7)}
				o.reg.Push(t, "app", "v1", o.layer)
				o.other.SetBlob("app", blockdev.Sum(o.layer.Blob), o.layer.Blob)
				o.ref = o.reg.Host + "/app:v1"
				tc.set(o)
				return o
			}
			o := newOdd()
			judge := containerdPulls(t, o.ref, o.dirs, o.cred)
			if (judge == nil) != (tc.refused == nil && !tc.looser) {
				t.Fatalf("containerd: %v", judge)
			}
			o = newOdd()
			err := shoalPulls(t, o.ref, o.dirs, o.cred)
			words := append(tc.refused, tc.stricter...)
			if (err == nil) != (words == nil) {
				t.Fatalf("containerd: %v; shoal: %v", judge, err)
			}
			if err == nil {
				for _, h := range o.other.Headers() {
					if h.Get("Authorization") != "" {
						t.Errorf("another host got the credential")
					}
				}
				return
			}
			for _, w := range words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the cause %q does not mention %q", err, w)
				}
			}
			if tc.not != "" && strings.Contains(err.Error(), tc.not) {
				t.Errorf("the cause %q mentions %q", err, tc.not)
			}
			noSecret(t, err.Error())
		})
	}
}

// TestProxy: HTTP_PROXY, HTTPS_PROXY and NO_PROXY count as they do for containerd. net/http reads
// them once for a process, so it is one of its own.
func TestProxy(t *testing.T) {
	const proxied = "SHOAL_TEST_PROXIED"
	if dirs := os.Getenv(proxied); dirs != "" {
		// By reference: what the cause says; empty: it is pulled.
		for ref, says := range map[string]string{
			"registry.example/app:v1": "", "direct.example/app:v1": "address",
			"tls.example/app:v1": "", "direct-tls.example/app:v1": "address",
			"refused.example/app:v1": "makes no tunnel to refused.invalid:443: HTTP 407",
		} {
			judge, err := containerdPulls(t, ref, []string{dirs}, nobody), shoalPulls(t, ref, []string{dirs}, nobody)
			if (judge == nil) != (says == "") || (err == nil) != (says == "") {
				t.Errorf("%s: containerd: %v; shoal: %v", ref, judge, err)
				continue
			}
			if err != nil && (!strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "word")) {
				t.Errorf("the cause is %q, want %q in it and no password", err, says)
			}
		}
		return
	}
	proxy := rt.NewFake(t) // gets requests for registry.example
	o := &odd{T: t, layer: rt.GzipLayer(t, "file", 1000, 1)}
	proxy.Push(t, "app", "v1", o.layer)
	o.over(rt.NewFakeTLS(t))
	tunnels := rt.NewFake(t)
	tunnels.Script(func(w http.ResponseWriter, r *http.Request) bool {
		return r.Host == "refused.invalid:443" && rt.Status(http.StatusProxyAuthRequired)(w, r)
	}, rt.Connect(o.reg.Host))
	dirs := t.TempDir()
	for host, content := range map[string]string{
		"registry.example":   "server = \"http://registry.invalid:5000\"\n",
		"direct.example":     "server = \"http://direct.invalid:5000\"\n",
		"tls.example":        "server = \"https://tls.invalid\"\nskip_verify = true\n",
		"refused.example":    "server = \"https://refused.invalid\"\nskip_verify = true\n",
		"direct-tls.example": "server = \"https://direct.invalid\"\nskip_verify = true\n",
	} {
		if err := os.MkdirAll(filepath.Join(dirs, host), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dirs, host, "hosts.toml"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProxy$", "-test.count=1")
	cmd.Env = append(os.Environ(), proxied+"="+dirs, "HTTP_PROXY=http://"+proxy.Host, "HTTPS_PROXY=http://user:word@"+tunnels.Host, "NO_PROXY=direct.invalid")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(proxy.Requests("GET", "/blobs/")) == 0 || len(tunnels.Requests("CONNECT")) == 0 || len(o.reg.Requests("GET", "/blobs/")) == 0 {
		t.Error("a proxy was not asked")
	}
}

var nobody image.Credential

const o127 = "127.0.0.1"

// mirror makes registry.example the name of reg, with a mirror that is asked first.
func (o *odd) mirror(u string) {
	o.other.Push(o.T, "app", "v1", o.layer)
	o.ref = "registry.example/app:v1"
	o.hosts("registry.example", "server = \"http://%s\"\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", o.reg.Host, u)
}

func keyPair(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	c, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	kb, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "client.cert"), filepath.Join(dir, "client.key")
	err = errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c}), 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kb}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}
