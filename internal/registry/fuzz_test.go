package registry

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// known fails unless err is of a kind that callers act upon.
func known(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, blockdev.ErrUnsupported) && !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatalf("error without a kind: %v", err)
	}
	if len(err.Error()) > 2000 {
		t.Fatalf("an error of %d bytes", len(err.Error()))
	}
}

// FuzzDocument reads manifests, and configs against their layers: whatever comes
// is an error of a known kind or obeys the limits.
func FuzzDocument(f *testing.F) {
	d := blockdev.Sum(nil).String()
	m := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + d + `","size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"` + d + `","size":7}]}`
	f.Add([]byte(m), []byte(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["`+d+`"]}}`))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"`+d+`","size":3,"platform":{"os":"linux","architecture":"arm","variant":"v7"}},{"digest":"`+d+`","size":3}]}`), []byte(`{}`))
	f.Add([]byte(`{"schemaVersion":1,"fsLayers":[{}]}`), []byte(`[]`))
	f.Add([]byte(strings.Replace(m, "gzip", "gzip+encrypted", 1)), []byte(`null`))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		doc, err := parseDocument(manifest)
		if err != nil {
			known(t, err)
			return
		}
		if (doc.Config == nil) == (doc.Manifests == nil) {
			t.Fatal("neither an image nor an index, or both")
		}
		match, guess := choose(doc, ociPlatform(image.Platform{OS: "linux", Architecture: "arm64"}))
		if len(match)+len(guess) > maxManifests || len(guess) > maxGuesses {
			t.Fatalf("%d and %d entries", len(match), len(guess))
		}
		if doc.Config == nil {
			return
		}
		cfg, layers, err := imageParts(doc)
		if err != nil {
			known(t, err)
			return
		}
		if cfg.size < 0 || cfg.size > maxConfig || len(layers) > maxLayers {
			t.Fatalf("beyond the limits: %+v, %d layers", cfg, len(layers))
		}
		ls, _, err := parseConfig(config, layers)
		if err != nil {
			known(t, err)
			return
		}
		if len(ls) != len(layers) {
			t.Fatalf("%d of %d layers", len(ls), len(layers))
		}
		for _, l := range ls {
			if l.Size < 0 || l.Size > maxLayerSize || !layerTypes[l.MediaType] {
				t.Fatalf("%+v", l)
			}
		}
	})
}

// FuzzReference: what is accepted is safe to be put into a URL.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"docker.io/library/redis:7", "[::1]:5000/a/b@" + blockdev.Digest{}.String(), "a/../b:c", "u:p@h/a:b", "h/a?b:c", "h/a%2f:b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseReference(s)
		if err != nil {
			known(t, err)
			return
		}
		if strings.ContainsAny(r.Name()+r.Tag, "?#%@\\ \r\n\t") || strings.Contains(r.Name(), "..") && !strings.Contains(r.Host, "..") || r.Repository == "" || r.Host == "" {
			t.Fatalf("%q became %+v", s, r)
		}
		if _, err := http.NewRequest(http.MethodGet, "https://"+r.Host+"/v2/"+r.Repository+"/manifests/"+r.Tag, nil); err != nil && r.Tag != "" {
			// A port beyond 65535 or an odd IPv6 address: an error later, not a leak.
			t.Skip(err)
		}
		again := r.Name()
		if r.Tag != "" {
			again += ":" + r.Tag
		}
		if r.Digest != (blockdev.Digest{}) {
			again += "@" + r.Digest.String()
		}
		if r.Tag == "" && r.Digest == (blockdev.Digest{}) {
			return
		}
		if r2, err := ParseReference(again); err != nil || r2 != r {
			t.Fatalf("%q became %+v, then %+v, %v", s, r, r2, err)
		}
	})
}

func FuzzHeaders(f *testing.F) {
	f.Add("120", "bytes 5-9/10", "dial https://u:p@h/p?X-Amz-Signature=abc: no")
	f.Add("Wed, 21 Oct 2015 07:28:00 GMT", "bytes */1", "\x00?\xff")
	f.Fuzz(func(t *testing.T, after, rng, text string) {
		if d := retryAfter(http.Header{"Retry-After": {after}}, time.Unix(1e9, 0)); d < 0 || d > maxRetryAfter {
			t.Fatalf("Retry-After %q is %s", after, d)
		}
		if n, ok := contentRangeStart(rng); ok && n < 0 {
			t.Fatalf("%q starts at %d", rng, n)
		}
		s := scrub(text)
		if len(s) > 310 || strings.ContainsAny(s, "\x00\n\r\x1b") || strings.Contains(s, "X-Amz-Signature=") && strings.Contains(text, "?X-Amz-Signature=") && !strings.Contains(strings.ReplaceAll(text, "?X-Amz-Signature=", ""), "X-Amz-Signature=") {
			t.Fatalf("%q", s)
		}
	})
}
