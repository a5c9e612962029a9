package pattern

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
		p, err := Parse(tt.pattern)
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		for _, ref := range tt.fits {
			if !p.Matches(ParseRef(ref)) {
				t.Errorf("%q does not fit %q", tt.pattern, ref)
			}
		}
		for _, ref := range tt.others {
			if p.Matches(ParseRef(ref)) {
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
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `"`+text+`"`) {
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
