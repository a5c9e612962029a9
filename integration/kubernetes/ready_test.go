//go:build kubernetes

package kubernetes

import (
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/report"
)

// TestMeasureReady: a pod of a real image is ready with a lazy image, sooner than
// with overlayfs, and after a while all of the image is on the node.
func TestMeasureReady(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	image := server(s.real, "python-django", "v1")
	ref := image["image"].(string)
	s.warm(t, ref)
	ready := map[string][]float64{}
	for range runs {
		for _, name := range []string{"one", "plain-one"} {
			n := s.node(t, name)
			s.forget(t, n)
			set, took := s.run(t, "ready", podSpec{node: on(n), container: image})
			ready[name] = append(ready[name], took.Seconds())
			if n.Shoal != nil {
				noError(t, lazy(ctx, n, ref))
				noError(t, n.Shoal.WaitLocal(ctx, ref, 5*time.Minute))
			}
			noError(t, set.remove(t))
		}
	}
	const what = "pod apply to Ready, python-django, warm supernode"
	figure(t, what+": shoal", "s", "", 0, ready["one"]...)
	figure(t, what+": overlayfs, cold", "s", "", 0, ready["plain-one"]...)
	figure(t, what+", against overlayfs cold", "x", report.AtMost, 0.40, ratios(ready["one"], ready["plain-one"])...)
}

// ratios are those of a and b, pair by pair.
func ratios(a, b []float64) []float64 {
	var out []float64
	for i := range a {
		out = append(out, a[i]/b[i])
	}
	return out
}
