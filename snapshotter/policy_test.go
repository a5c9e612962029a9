package snapshotter

import (
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// withRules gives the node a policy.
func withRules(t testing.TB, r policy.Rules) func(*nodeConfig) {
	t.Helper()
	if r.Lazy == nil {
		r.Lazy = []string{"*"}
	}
	if r.Default == "" {
		r.Default = policy.All
	}
	p := must(policy.New(r))(t)
	return func(c *nodeConfig) { c.Policy = p }
}

// An image that the config does not want to be lazy is unpacked without anybody
// being asked for it; the log says why, without a warning.
func TestNever(t *testing.T) {
	n := newNode(t, withRules(t, policy.Rules{Never: []string{"registry.test/db/*"}}))
	db := newImage("registry.test/db/one:1", threeLayers(t)...)
	app := newImage("registry.test/app:1", newLayer(t, file("other")))
	n.images.publish(db, app)
	_, fetched, err := n.pull(bg, db)
	check(t, err)
	if len(fetched) != 3 {
		t.Errorf("layers %v were fetched, want all three", fetched)
	}
	if got := n.images.asked(); got != 0 {
		t.Errorf("the supernode was asked %d times for an image that may not be lazy", got)
	}
	if lines := n.log.lines(db.ref); len(lines) != 1 || !strings.Contains(lines[0], "images.never names it") || strings.Contains(lines[0], "WARN") {
		t.Errorf("log: %q", lines)
	}
	if _, err := n.Keep(bg, db.ref, blockdev.Digest{}); err == nil || !strings.Contains(err.Error(), "images.never") {
		t.Errorf("a prefetch of it to this node: %v", err)
	}
	if _, fetched, err = n.pull(bg, app); err != nil || len(fetched) != 0 {
		t.Errorf("another image: layers %v were fetched, %v", fetched, err)
	}
}
