package node

import (
	"log/slog"
	"slices"
	"testing"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/reload"
)

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
		r := reload.New(running, func() (*config.Node, error) { return next, nil }, slog.New(slog.DiscardHandler))
		reloadSupernodes(r, nil, elsewhere(running))
		if done, err := r.Reload(); err != nil || !slices.Equal(done.Restart, []string{"supernodes"}) || len(done.Changed) > 0 {
			t.Errorf("%v: %+v, %v", c, done, err)
		}
	}
}
