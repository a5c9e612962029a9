package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// TestDrillBigStore: a supernode with a large store serves seconds after it was started,
// if it was stopped in good order. The store is made up (lab.MakeStore): a TB (in make test, a GB).
func TestDrillBigStore(t *testing.T) {
	ctx := t.Context()
	size := int64(1 << 30)
	if isDrill() {
		size = 1 << 40
	}
	l := newLab(t)
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	noError(t, super.Stop())
	layers := must(lab.MakeStore(filepath.Join(l.Path("super"), "store"), size))(t)
	start := func() float64 {
		noError(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0o200))
		began := time.Now()
		super = must(l.RestartSupernode(ctx, super))(t)
		took := time.Since(began).Seconds()
		if n := must(super.Metric(ctx, "shoal_supernode_store_layers"))(t); int(n) != layers {
			t.Fatalf("the supernode has %.0f layers, and %d were stored", n, layers)
		}
		return took
	}
	first := start()
	noError(t, super.Stop())
	second := start() // after its own end
	name := fmt.Sprintf("start of a supernode with %d GB of records after a clean end", size>>30)
	figure(t, name, "s", report.AtMost, 5, first, second)
	noError(t, super.Stop())
}
