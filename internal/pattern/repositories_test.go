package pattern

import (
	"strings"
	"testing"
)

// TestRepositories: a list has what one of its patterns fits, and takes no tags.
func TestRepositories(t *testing.T) {
	r, err := ParseRepositories([]string{"registry.example.com:5000/base/*", "redis"})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"registry.example.com:5000/base/go": true, "registry.example.com:5000/base/a/b": true, "docker.io/library/redis": true,
		"registry.example.com/base/go": false, "registry.example.com:5000/other": false, "docker.io/library/redis2": false,
	} {
		if r.Has(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
	if none, err := ParseRepositories(nil); err != nil || none.Has("docker.io/library/redis") {
		t.Errorf("an empty list has a repository; %v", err)
	}
	if !(*Repositories)(nil).Has("docker.io/library/redis") {
		t.Error("no list has not every repository")
	}
	for _, text := range []string{"redis:7", "redis@" + hash, "quay.io", ""} {
		if _, err := ParseRepositories([]string{"*", text}); err == nil || !strings.Contains(err.Error(), `"`+text+`"`) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
