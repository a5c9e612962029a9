package integration

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestReadiness: what lives is not always ready: a supernode before its store is open,
// and a node that no supernode has let in yet. A node that has been ready stays so when
// its supernode goes away.
func TestReadiness(t *testing.T) {
	bin(t) // skips without root
	l := newLab(t)
	ctx := t.Context()
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	type prober interface {
		Probe(ctx context.Context, path string) (int, string, error)
	}
	want := func(p prober, path string, code int, text string) {
		t.Helper()
		noError(t, lab.WaitFor(ctx, path, 20*time.Second, func() error {
			got, said, err := p.Probe(ctx, path)
			if err == nil && (got != code || !strings.Contains(said, text)) {
				err = fmt.Errorf("%d %q, want %d %q", got, said, code, text)
			}
			return err
		}))
	}
	want(super, "/readyz", http.StatusOK, "ok")
	noError(t, super.Stop())
	node := must(l.StartNode(ctx, "node", super.Address, ""))(t)
	want(node, "/healthz", http.StatusOK, "ok")
	want(node, "/readyz", http.StatusServiceUnavailable, "no supernode has let this node in")
	alone := must(l.StartNode(ctx, "alone", "", ""))(t)
	want(alone, "/readyz", http.StatusOK, "ok")

	// A pipe in the place of the store's index: it is read when somebody writes to it.
	index := l.Path("super", "store", "index.db")
	noError(t, os.Rename(index, index+".away"))
	noError(t, syscall.Mkfifo(index, 0o600))
	p := must(l.Start("super", "shoal", nil, "supernode", "--config", l.Path("super.toml")))(t)
	want(super, "/healthz", http.StatusOK, "ok")
	want(super, "/readyz", http.StatusServiceUnavailable, "opens its store")
	want(node, "/readyz", http.StatusServiceUnavailable, "no supernode has let this node in")
	noError(t, p.Kill())
	noError(t, os.Rename(index+".away", index))
	super = must(l.RestartSupernode(ctx, super))(t)
	want(super, "/readyz", http.StatusOK, "ok")
	want(node, "/readyz", http.StatusOK, "ok")
	noError(t, super.Stop())
	want(node, "/readyz", http.StatusOK, "ok")
}
