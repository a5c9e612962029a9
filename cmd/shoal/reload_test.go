package main

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
	r := newReloader(running, func() (*config.Supernode, error) { return next, loadErr }, slog.New(slog.DiscardHandler))
	applied := 0
	r.on(func(*config.Supernode) error { applied++; return applyErr }, "registry.allowed", "registry.trusted")
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
	next.Registry.Allowed, applyErr = []string{"*"}, errRestart
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

// TestSupernodesNeedRestart: while a node runs, it cannot learn that its supernode is on
// another machine or on its own, nor whether it embeds one.
func TestSupernodesNeedRestart(t *testing.T) {
	const id = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN@"
	for _, c := range []struct{ running, next []string }{
		{[]string{id + "10.0.0.5:7700"}, []string{id + "127.0.0.1:7700"}},
		{[]string{id + "localhost:7700"}, []string{id + "10.0.0.5:7700"}},
		{[]string{id + "10.0.0.5:7700"}, []string{}},
	} {
		running, next := config.DefaultNode(), config.DefaultNode()
		running.Supernodes, next.Supernodes = c.running, c.next
		r := newReloader(running, func() (*config.Node, error) { return next, nil }, slog.New(slog.DiscardHandler))
		reloadSupernodes(r, nil, remoteSupernode(running))
		if done, err := r.Reload(); err != nil || !slices.Equal(done.Restart, []string{"supernodes"}) || len(done.Changed) > 0 {
			t.Errorf("%v: %+v, %v", c, done, err)
		}
	}
}
