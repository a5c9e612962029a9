//go:build kubernetes

package kubernetes

import (
	"context"
	"math"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab/cluster"
	"github.com/shoalfs/shoal/integration/report"
)

// TestImageFs: once all of an image is on the node, kubelet is told what it takes on the
// disk.
func TestImageFs(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	n := s.node(t, "one")
	s.forget(t, n)
	image := server(s.real, "python-django", "v1")
	ref := image["image"].(string)
	s.warm(t, ref)
	s.run(t, "imagefs", podSpec{node: on(n), container: image})
	noError(t, n.Shoal.WaitProven(ctx, ref, 5*time.Minute))
	off := waitImageFs(t, s, n)
	figure(t, "imageFs bytes against du after completion, difference", "%", report.AtMost, 5, off)
	if off > 5 {
		t.Errorf("kubelet says %.1f %% more or less than du", off)
	}
}

// waitImageFs returns by how many percent kubelet's figure differs from that of du, as
// soon as that is little, or after a while. containerd and kubelet ask only now and then.
func waitImageFs(t *testing.T, s *site, n *cluster.Node) (off float64) {
	t.Helper()
	ctx := t.Context()
	began := time.Now()
	for {
		var summary struct {
			Node struct {
				Runtime struct{ ImageFs struct{ UsedBytes int64 } }
			}
		}
		noError(t, s.Get(ctx, "/api/v1/nodes/"+n.Name+"/proxy/stats/summary", &summary))
		used := summary.Node.Runtime.ImageFs.UsedBytes
		du := must(n.Usage(ctx, "/var/lib/shoal"))(t)
		off = 100 * math.Abs(float64(used)/float64(du)-1)
		if off < 5 || time.Since(began) > 90*time.Second {
			t.Logf("imageFs says %d bytes, du %d", used, du)
			return off
		}
		wait(ctx, time.Second)
	}
}

// wait returns after this time, or with the end of ctx.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
