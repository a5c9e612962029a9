package policy

import (
	"strings"
	"testing"
)

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
