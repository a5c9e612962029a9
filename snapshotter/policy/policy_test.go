package policy

import (
	"path"
	"strings"
	"testing"
)

const hash = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// TestPattern: what patterns fit, and what they do not.
func TestPattern(t *testing.T) {
	for _, tt := range []struct {
		pattern string
		fits    []string
		others  []string
	}{
		{"*", []string{"docker.io/library/redis:7", "registry.example.com:5000/a/b/c@" + hash, "redis"}, nil},
		{
			"registry.example.com/base/*",
			[]string{"registry.example.com/base/go:1", "registry.example.com/base/a/b:1", "registry.example.com/base/a@" + hash},
			[]string{"registry.example.com/base:1", "registry.example.com/based/go:1", "registry.example.com:5000/base/go:1", "docker.io/base/go:1"},
		},
		{
			"docker.io/library/redis:*",
			[]string{"docker.io/library/redis:7", "redis:7", "redis", "index.docker.io/library/redis:7", "docker.io/library/redis:7@" + hash, "redis@" + hash},
			[]string{"docker.io/library/redis-x:7", "docker.io/other/redis:7", "registry.example.com/library/redis:7"},
		},
		{"redis", []string{"docker.io/library/redis:7", "docker.io/library/redis@" + hash}, []string{"docker.io/bitnami/redis:7"}},
		{"redis:7*", []string{"docker.io/library/redis:7", "redis:7.2"}, []string{"redis:6", "redis:17", "redis@" + hash, "redis"}},
		{"redis:latest", []string{"redis"}, []string{"redis:7"}},
		{"bitnami/*", []string{"docker.io/bitnami/redis:1"}, []string{"docker.io/library/redis:1", "quay.io/bitnami/redis:1"}},
		{"index.docker.io/library/redis", []string{"redis:7"}, []string{"quay.io/library/redis:7"}},
		{"localhost/*", []string{"localhost/x:1", "localhost/y/z:1"}, []string{"docker.io/localhost/x:1"}},
		{"localhost:5000/*", []string{"localhost:5000/x:1"}, []string{"localhost/x:1"}},
		{"*.example.com/*", []string{"a.example.com/x:1", "a.b.example.com/x/y:1"}, []string{"example.com/x:1", "docker.io/library/x:1"}},
		{"*/base/*", []string{"quay.io/base/x:1", "quay.io/team/base/x:1"}, []string{"quay.io/x/y:1"}},
		{"*:latest", []string{"redis", "quay.io/a/b:latest"}, []string{"redis:7", "redis@" + hash}},
		{"*-dev", []string{"quay.io/a/b-dev:1"}, []string{"quay.io/a/b:1-dev", "quay.io/a-dev/b:1"}},
		{"quay.io/a*b*c:1", []string{"quay.io/abc:1", "quay.io/axbybzc:1"}, []string{"quay.io/acb:1", "quay.io/ac:1"}},
		{"redis@" + hash, []string{"redis@" + hash, "redis:7@" + hash}, []string{"redis:7", "redis@" + strings.Replace(hash, "0", "1", 1)}},
		{"redis@*", []string{"redis@" + hash, "redis:7"}, nil},
		{"host:5000/x", []string{"host:5000/x:1"}, []string{"host:5001/x:1"}},
	} {
		p, err := parsePattern(tt.pattern)
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		for _, ref := range tt.fits {
			if !p.matches(parseRef(ref)) {
				t.Errorf("%q does not fit %q", tt.pattern, ref)
			}
		}
		for _, ref := range tt.others {
			if p.matches(parseRef(ref)) {
				t.Errorf("%q fits %q", tt.pattern, ref)
			}
		}
	}
}

// TestBadPattern: an error quotes the pattern and says what is wrong.
func TestBadPattern(t *testing.T) {
	for text, want := range map[string]string{
		"":                         `"*" names every image`,
		"a b":                      "white space",
		"https://quay.io/*":        "scheme",
		"quay.io/a?":               "the only wildcard",
		"quay.io/[ab]":             "the only wildcard",
		"quay.io/base/":            `"quay.io/base/*"`,
		"quay.io//x":               "two slashes",
		"quay.io":                  `"quay.io/*"`,
		"localhost":                `"localhost/*"`,
		"quay.io/Base/*":           "lowercase",
		"quay.io/x:":               "invalid reference",
		"quay.io/x:-a*":            "invalid reference",
		"redis@sha256:12":          "invalid",
		"redis@sha256:*":           "invalid",
		"quay.io/x@" + hash + "0*": "invalid",
		"host:port/x":              "invalid reference",
		"/x":                       "invalid reference",
	} {
		if _, err := parsePattern(text); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `"`+text+`"`) {
			t.Errorf("%q: error %v does not quote it, or does not say %q", text, err, want)
		}
	}
}

// FuzzGlob compares with the standard library, which has "*" stop at slashes.
func FuzzGlob(f *testing.F) {
	f.Add("a*b*c", "aXbYc")
	f.Add("*a*", "bab")
	f.Add("a*a", "a")
	f.Add("**", "")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if strings.ContainsAny(pattern+s, `/?[]\`) {
			t.Skip()
		}
		want, err := path.Match(pattern, s)
		if err != nil {
			t.Skip()
		}
		if got := glob(pattern, s); got != want {
			t.Errorf("glob(%q, %q) = %v", pattern, s, got)
		}
	})
}

func must(t *testing.T, r Rules) *Policy {
	t.Helper()
	p, err := New(r)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLazy(t *testing.T) {
	p := must(t, Rules{Lazy: []string{"quay.io/*", "redis"}, Never: []string{"quay.io/db/*"}, Default: All})
	for ref, why := range map[string]string{
		"quay.io/app:1":    "",
		"redis:7":          "",
		"quay.io/db/x:1":   `the config's images.never names it ("quay.io/db/*")`,
		"docker.io/a/b:1":  "the config's images.lazy does not name it",
		"nginx":            "the config's images.lazy does not name it",
		"quay.io/db-x:1":   "",
		"Not A Reference!": "the config's images.lazy does not name it",
	} {
		if got := p.NotLazy(ref); got != why || p.Lazy(ref) != (why == "") {
			t.Errorf("%s: %q, want %q", ref, got, why)
		}
	}
	if p := must(t, Rules{Default: All}); p.Lazy("redis") {
		t.Error("an empty list lets an image be lazy")
	}
}

// TestMode: the most specific pattern counts, in whatever order they come.
func TestMode(t *testing.T) {
	p := must(t, Rules{
		Default: Startup, Eager: []string{"quay.io/base/*"},
		Prefetch: map[string]Mode{
			"*":                  None,
			"quay.io/*":          All,
			"quay.io/batch/*":    None,
			"quay.io/batch/x":    Startup,
			"quay.io/batch/x:1*": All,
			"quay.io/batch/x:10": None,
			"quay.io/base/*":     None,
			"*:latest":           Startup,
		},
	})
	for ref, want := range map[string]Mode{
		"docker.io/a/b:1":    None,
		"nginx":              Startup,
		"quay.io/app:1":      All,
		"quay.io/app:latest": All, // the name counts before the tag
		"quay.io/batch/y:1":  None,
		"quay.io/batch/x:2":  Startup,
		"quay.io/batch/x:12": All,
		"quay.io/batch/x:10": None,
		"quay.io/base/go:1":  All, // it is eager
	} {
		if got := p.Prefetch(ref); got != want {
			t.Errorf("%s: %s, want %s", ref, got, want)
		}
	}
	if got := must(t, Rules{Default: Startup}).Prefetch("redis"); got != Startup {
		t.Errorf("without patterns: %s", got)
	}
	if !p.Eager("quay.io/base/go:1") || p.Eager("quay.io/app:1") {
		t.Error("eager is not what it says")
	}
}

// TestNil: without a policy every image is lazy, and all of it is fetched.
func TestNil(t *testing.T) {
	var p *Policy
	if !p.Lazy("redis") || p.Eager("redis") || p.Prefetch("redis") != All {
		t.Error("a nil policy says something else")
	}
}

// TestRefused: all that is wrong is said at once, by the names of the config.
func TestRefused(t *testing.T) {
	_, err := New(Rules{
		Lazy: []string{"quay.io"}, Never: []string{""}, Eager: []string{"a b"}, Default: "some",
		Prefetch: map[string]Mode{"redis": All, "docker.io/library/redis": None, "quay.io/": All, "x": "ALL"},
	})
	for _, want := range []string{
		"images.lazy: \"quay.io\"", "images.never: \"\"", "images.eager: \"a b\"", `prefetch is "some"`,
		`"docker.io/library/redis" and "redis" name the same images`, `images.prefetch: "quay.io/"`, `the mode of "x" is "ALL"`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %s", err, want)
		}
	}
}
