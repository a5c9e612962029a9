package layers

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
	"github.com/shoalfs/shoal/p2p/route"
)

// lines keeps what is logged.
type lines struct {
	mu  sync.Mutex
	all []string
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, string(b))
	return len(b), nil
}

func (l *lines) count(what string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.all {
		if strings.Contains(line, what) {
			n++
		}
	}
	return n
}

// away is a sibling that cannot be reached.
type away struct{ Sibling }

func (away) Status() error { return fmt.Errorf("not connected: %w", blockdev.ErrUnavailable) }

// TestLogOfRequests: however often nodes ask for an image that they cannot get, the log
// stays short.
func TestLogOfRequests(t *testing.T) {
	f := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "l", 10, 1)
	push := func(name string, blob bool, layer registrytest.Layer) string {
		config := registrytest.Config(t, registrytest.Platform{OS: amd64.OS, Architecture: amd64.Architecture}, layer)
		f.PushBlob(t, name, config)
		if blob {
			f.PushBlob(t, name, layer.Blob)
		}
		f.PushManifest(t, name, "v1", registrytest.TypeManifest, registrytest.Manifest(t, registrytest.TypeManifest, config, layer))
		return f.Host + "/" + name + ":v1"
	}
	right, wrong, missing := l, l, l
	wrong.DiffID = blockdev.Digest{1}
	missing.Blob = []byte("not pushed")
	stored := push("right", true, right)
	self, owner := peer.ID("self"), peer.ID("owner")
	for route.Order(l.DiffID, []peer.ID{self, owner})[0] != owner {
		owner += "."
	}
	for _, c := range []struct {
		name, image, line string
	}{
		{"another DiffID", push("wrong", true, wrong), "wrong about a layer"},
		{"a repository without the layer", push("none", false, right), "does not show that this repository has it"},
		{"the owner is away", push("missing", false, missing), "does not answer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var log lines
			r := newRig(t, func(c *Config) {
				c.Log = slog.New(slog.NewTextHandler(&log, nil))
				c.Self, c.Siblings = self, map[peer.ID]Sibling{owner: away{}}
			})
			if err := r.ensure(t, stored); err != nil {
				t.Fatal(err)
			}
			for range 100 {
				if err := r.ensure(t, c.image); err == nil {
					t.Fatal("the image is given")
				}
			}
			if n := log.count(c.line); n != 1 {
				t.Errorf("%d lines of 100 requests, want 1", n)
			}
		})
	}
}
