package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logBuffer collects log output of several goroutines.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newClient(t *testing.T, change ...func(*registry.Config)) *registry.Client {
	t.Helper()
	cfg := registry.Config{CacheDir: t.TempDir(), Timeout: 10 * time.Second, Stall: 5 * time.Second}
	for _, f := range change {
		f(&cfg)
	}
	c, err := registry.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func credOf(t registrytest.Target) image.Credential {
	return image.Credential{Username: t.User, Secret: t.Password}
}

var amd64 = image.Platform{OS: "linux", Architecture: "amd64"}

// fetch reads a layer from offset to its end.
func fetch(ctx context.Context, c *registry.Client, m *registry.Manifest, i int, cred image.Credential, off int64) ([]byte, error) {
	rc, err := c.Fetch(ctx, m, m.Layers[i], cred, off)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(rc)
	return b, errors.Join(err, rc.Close())
}

// wantError fails unless err is one of kind, and carries no secret.
func wantError(t *testing.T, err, kind error, parts ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want one that is %q", err, kind)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not mention %q", err, p)
		}
	}
	noSecret(t, err.Error())
}

func noSecret(t *testing.T, s string) {
	t.Helper()
	for _, secret := range []string{registrytest.RealPassword, "Signature=", "X-Amz"} {
		if strings.Contains(s, secret) {
			t.Errorf("%q holds the secret %q", s, secret)
		}
	}
}
