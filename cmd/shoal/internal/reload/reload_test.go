package reload

import (
	"errors"
	"log/slog"
	"slices"
	"testing"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
)

// TestReloader: a change that fails leaves its keys as they were, and is tried again;
// one that nobody applies is said each time until the daemon is restarted.
func TestReloader(t *testing.T) {
	running, next := config.DefaultSupernode(), config.DefaultSupernode()
	var loadErr, applyErr error
	r := New(running, func() (*config.Supernode, error) { return next, loadErr }, slog.New(slog.DiscardHandler))
	applied := 0
	r.On(func(*config.Supernode) error { applied++; return applyErr }, "registry.allowed", "registry.trusted")
	want := func(when string, calls int, changed, restart []string, fails bool) {
		t.Helper()
		done, err := r.Reload()
		if (err != nil) != fails || applied != calls {
			t.Errorf("%s: %v, applied %d times, want %d", when, err, applied, calls)
		}
		if done != nil && (!slices.Equal(done.Changed, changed) || !slices.Equal(done.Restart, restart)) {
			t.Errorf("%s: %+v", when, done)
		}
	}
	want("nothing has changed", 0, nil, nil, false)
	next.Registry.Allowed, next.Root = []string{"quay.io/*"}, "/elsewhere"
	loadErr = errors.New("no such file")
	want("not read", 0, nil, nil, true)
	loadErr, applyErr = nil, errors.New("cannot")
	want("not applied", 1, nil, []string{"root"}, true)
	applyErr = nil
	want("applied", 2, []string{"registry.allowed"}, []string{"root"}, false)
	want("again", 2, nil, []string{"root"}, false)
	next.Root = running.Root
	want("back", 2, nil, nil, false)
	next.Registry.Allowed, applyErr = []string{"*"}, ErrRestart
	want("not while it runs", 3, nil, []string{"registry.allowed"}, false)
}

// TestReloadKeys: the keys that daemons apply are keys.
func TestReloadKeys(t *testing.T) {
	for _, key := range []string{"log.level", "images.lazy", "images.never", "images.eager", "images.prefetch", "prefetch", "prefetch_rate", "max_download", "max_upload", "supernodes",
		"embedded.registry.allowed", "embedded.registry.max_download"} {
		if _, ok := config.Values(config.DefaultNode())[key]; !ok {
			t.Errorf("a node has no key %s", key)
		}
	}
	for _, key := range []string{"log.level", "registry.allowed", "registry.max_download", "max_upload", "siblings"} {
		if _, ok := config.Values(config.DefaultSupernode())[key]; !ok {
			t.Errorf("a supernode has no key %s", key)
		}
	}
}
