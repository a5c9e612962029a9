//go:build kubernetes

package kubernetes

import (
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/report"
)

// TestMeasureBurst: 30 pods of 3 images on 2 nodes, all at once.
func TestMeasureBurst(t *testing.T) {
	s := newSite(t)
	names := []string{"python-django", "node-express", "redis"}
	took := map[string]float64{}
	for _, nodes := range [][]string{{"one", "two"}, {"plain-one", "plain-two"}} {
		snapshotter := "overlayfs"
		for _, name := range nodes {
			n := s.node(t, name)
			s.forget(t, n)
			if n.Shoal != nil {
				snapshotter = "shoal"
			}
		}
		for _, name := range names {
			s.warm(t, s.real.Addr+"/"+name+":v1")
		}
		var all []*pods
		began := time.Now()
		for _, name := range names {
			all = append(all, s.create(t, "burst-"+name, podSpec{
				n: 10, node: map[string]string{"snapshotter": snapshotter}, container: server(s.real, name, "v1"),
			}))
		}
		for _, set := range all {
			set.ready(t)
		}
		took[snapshotter] = time.Since(began).Seconds()
		for _, set := range all {
			noError(t, set.remove(t))
		}
	}
	const what = "30 pods of 3 images on 2 nodes, all Ready"
	figure(t, what+": shoal", "s", "", 0, took["shoal"])
	figure(t, what+": overlayfs, cold", "s", "", 0, took["overlayfs"])
	figure(t, what+", against overlayfs", "x", report.AtMost, 0.40, took["shoal"]/took["overlayfs"])
}
