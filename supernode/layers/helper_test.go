package layers

import (
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var amd64 = image.Platform{OS: "linux", Architecture: "amd64"}

// rig is Layers with a store, for images that anybody may have.
type rig struct{ *Layers }

func newRig(t *testing.T, change ...func(*Config)) rig {
	t.Helper()
	dir := t.TempDir()
	leases := NewLeases(time.Hour)
	log := slog.New(slog.DiscardHandler)
	s, err := store.Open(store.Config{Dir: filepath.Join(dir, "store"), Yield: leases.Yield})
	if err != nil {
		t.Fatal(err)
	}
	reg, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Store: s, Registry: reg, Leases: leases, Log: log, Ingest: ingest.Config{SpoolDir: filepath.Join(dir, "spool"), Parallel: 2}}
	for _, f := range change {
		f(&cfg)
	}
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(l.Close(), reg.Close(), s.Close(), leases.Close()); err != nil {
			t.Error(err)
		}
	})
	return rig{l}
}

// ensure brings all layers of an image, one after the other.
func (r rig) ensure(t *testing.T, ref string) error {
	t.Helper()
	m, err := r.cfg.Registry.Resolve(t.Context(), image.Request{Ref: ref, Platform: amd64})
	if err != nil {
		t.Fatal(err)
	}
	var errs []error
	for _, l := range m.Layers {
		release, err := r.Ensure(t.Context(), Request{Manifest: m, Layer: l, Verdict: access.Verdict{Public: true}})
		if err == nil {
			release()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
