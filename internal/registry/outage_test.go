package registry_test

import (
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestOutageIsOneLine: many requests that get what a tag named last are one line in the log.
func TestOutageIsOneLine(t *testing.T) {
	f, req, _ := newImage(t)
	req.Manifest = blockdev.Digest{}
	var logs logBuffer
	c := newClient(t, func(cfg *registry.Config) {
		cfg.TagTTL = time.Nanosecond
		cfg.Log = slog.New(slog.NewTextHandler(&logs, nil))
	})
	if _, err := c.Resolve(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	const askers = 100
	var begun atomic.Int64
	f.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
		for begun.Load() < askers {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond) // until they all wait
		registrytest.Fail(w, http.StatusServiceUnavailable, "")
		return true
	})
	var wg sync.WaitGroup
	for range askers {
		wg.Go(func() {
			begun.Add(1)
			if _, err := c.Resolve(t.Context(), image.Request{Ref: req.Ref, Platform: req.Platform}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := strings.Count(logs.String(), "registry unavailable"); n != 1 {
		t.Errorf("%d lines for %d requests", n, askers)
	}
}
