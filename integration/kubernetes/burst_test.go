//go:build kubernetes

package kubernetes

import (
	"slices"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab/cluster"
	"github.com/shoalfs/shoal/integration/report"
)

// TestMeasureBurst: 30 pods of 3 images on 2 nodes, all at once: with shoal, with overlayfs,
// and with overlayfs and all images unpacked before. The last is the floor: no snapshotter
// can take less.
func TestMeasureBurst(t *testing.T) {
	s := newSite(t)
	images := []string{"python-django", "node-express", "redis"}
	lazily := []*cluster.Node{s.node(t, "one"), s.node(t, "two")}
	plain := []*cluster.Node{s.node(t, "plain-one"), s.node(t, "plain-two")}
	every := slices.Concat(lazily, plain)
	for _, name := range images {
		s.warm(t, s.real.Addr+"/"+name+":v1")
	}
	burst := func(snapshotter string, cold ...*cluster.Node) float64 {
		t.Helper()
		// What goes on after the burst before would take processor time from this one: the
		// removal of pods, and fetching and proving of lazy images, which forget ends.
		for _, n := range every {
			s.clear(t, n)
		}
		for _, n := range cold {
			s.forget(t, n)
		}
		var all []*pods
		began := time.Now()
		for _, name := range images {
			all = append(all, s.create(t, "burst-"+name, podSpec{
				n: 10, node: map[string]string{"snapshotter": snapshotter}, container: server(s.real, name, "v1"),
			}))
		}
		for _, set := range all {
			set.ready(t)
		}
		took := time.Since(began).Seconds()
		for _, set := range all {
			noError(t, set.remove(t))
		}
		return took
	}
	shoal := burst("shoal", every...)
	overlayfs := burst("overlayfs", every...)
	floor := burst("overlayfs")

	const what = "30 pods of 3 images on 2 nodes, all Ready"
	figure(t, what+": shoal", "s", "", 0, shoal)
	figure(t, what+": overlayfs, cold", "s", "", 0, overlayfs)
	figure(t, what+": floor (overlayfs, all images unpacked before)", "s", "", 0, floor)
	figure(t, what+", against overlayfs", "x", report.AtMost, 0.40, shoal/overlayfs)
	figure(t, what+", floor against overlayfs, cold", "x", "", 0, floor/overlayfs)
	if overlayfs <= floor {
		t.Fatalf("overlayfs took %.1f s with its pulls and %.1f s without: so the part of the pull is not measured", overlayfs, floor)
	}
	figure(t, what+", the pull alone: (shoal - floor) / (overlayfs, cold - floor)", "x", "", 0, (shoal-floor)/(overlayfs-floor))
}
