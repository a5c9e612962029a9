package layers

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

func TestLeases(t *testing.T) {
	var mu sync.Mutex
	pins := map[blockdev.Digest]int{}
	pin := func(d blockdev.Digest) func() {
		mu.Lock()
		defer mu.Unlock()
		pins[d]++
		return func() {
			mu.Lock()
			defer mu.Unlock()
			pins[d]--
		}
	}
	l := NewLeases(time.Hour)
	take := func(d blockdev.Digest) func() { return l.take(d, pin) }
	a, b := blockdev.Digest{1}, blockdev.Digest{2}
	done := take(a)
	take(a)()
	take(b)()
	l.expire(time.Now())
	if pins[a] != 1 || pins[b] != 1 {
		t.Errorf("%v", pins)
	}
	l.expire(time.Now().Add(61 * time.Minute))
	if pins[a] != 1 || pins[b] != 0 {
		t.Errorf("a is in use, b has expired: %v", pins)
	}
	done()
	done()
	l.expire(time.Now().Add(61 * time.Minute))
	if pins[a] != 0 || pins[b] != 0 {
		t.Errorf("expired, but pinned: %v", pins)
	}
	// The oldest that nobody uses is given up.
	take(b)()
	inUse := take(a)
	take(blockdev.Digest{3})()
	if !l.Yield() || pins[b] != 0 || pins[a] != 1 || pins[blockdev.Digest{3}] != 1 {
		t.Errorf("the oldest is not given up: %v", pins)
	}
	if !l.Yield() || l.Yield() || pins[a] != 1 {
		t.Errorf("what is in use is given up: %v", pins)
	}
	inUse()
	take(a)()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if pins[a] != 0 {
		t.Errorf("closed, but pinned: %v", pins)
	}
}

// A registry may say what it likes about layers that are never stored, or are not
// what the image says: nothing of it is leased.
func TestOnlyStoredIsLeased(t *testing.T) {
	f := registrytest.NewFake(t)
	r := newRig(t)
	held := func() int {
		leases := r.cfg.Leases
		leases.mu.Lock()
		defer leases.mu.Unlock()
		return len(leases.held)
	}
	l := registrytest.GzipLayer(t, "l", 10, 1)
	push := func(name string, layers ...registrytest.Layer) {
		config := registrytest.Config(t, registrytest.Platform{OS: amd64.OS, Architecture: amd64.Architecture}, layers...)
		f.PushBlob(t, name, config)
		f.PushManifest(t, name, "v1", registrytest.TypeManifest, registrytest.Manifest(t, registrytest.TypeManifest, config, layers...))
	}
	var missing []registrytest.Layer
	for i := range 200 {
		x := l
		x.Blob = fmt.Appendf(nil, "none %d", i)
		x.DiffID = blockdev.Sum(x.Blob)
		missing = append(missing, x)
	}
	push("missing", missing...)
	wrong := l
	wrong.DiffID = blockdev.Digest{1}
	f.PushBlob(t, "wrong", l.Blob)
	push("wrong", wrong)
	f.Push(t, "right", "v1", l)
	for _, name := range []string{"missing", "wrong"} {
		if err := r.ensure(t, f.Host+"/"+name+":v1"); err == nil {
			t.Errorf("the image %q is given", name)
		}
		if n := held(); n != 0 {
			t.Errorf("%q: %d diffs are leased, none is right", name, n)
		}
	}
	for range 2 {
		if err := r.ensure(t, f.Host+"/right:v1"); err != nil {
			t.Fatal(err)
		}
		if n := held(); n != 1 {
			t.Errorf("%d diffs are leased, one is stored", n)
		}
	}
}
