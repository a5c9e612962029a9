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
// can take less. Each image has run in the datacenter before.
func TestMeasureBurst(t *testing.T) {
	s := newSite(t)
	images := []string{"python-django", "node-express", "redis"}
	lazily := []*cluster.Node{s.node(t, "one"), s.node(t, "two")}
	plain := []*cluster.Node{s.node(t, "plain-one"), s.node(t, "plain-two")}
	every := slices.Concat(lazily, plain)
	for _, name := range images {
		s.warm(t, s.real.Addr+"/"+name+":v1")
	}
	s.learn(t, lazily[0], images)
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
	before := startupBytes(t, lazily)
	shoal := burst("shoal", every...)
	startup := startupBytes(t, lazily) - before
	if startup == 0 {
		t.Fatal("no node has fetched anything by a startup profile")
	}
	overlayfs := burst("overlayfs", every...)
	floor := burst("overlayfs")

	const what = "30 pods of 3 images on 2 nodes, all Ready"
	figure(t, what+": shoal", "s", "", 0, shoal)
	figure(t, what+": shoal, fetched by startup profiles", "MB", "", 0, startup/1e6)
	figure(t, what+": overlayfs, cold", "s", "", 0, overlayfs)
	figure(t, what+": floor (overlayfs, all images unpacked before)", "s", "", 0, floor)
	figure(t, what+", against overlayfs", "x", report.AtMost, 0.40, shoal/overlayfs)
	figure(t, what+", floor against overlayfs, cold", "x", "", 0, floor/overlayfs)
	if overlayfs <= floor {
		t.Fatalf("overlayfs took %.1f s with its pulls and %.1f s without: so the part of the pull is not measured", overlayfs, floor)
	}
	figure(t, what+", the pull alone: (shoal - floor) / (overlayfs, cold - floor)", "x", "", 0, (shoal-floor)/(overlayfs-floor))
}

// learn starts a pod of each image on a node, so that the supernode has their startup
// profiles, as it has of images that have run somewhere in its datacenter.
func (s *site) learn(t *testing.T, n *cluster.Node, images []string) {
	t.Helper()
	s.forget(t, n)
	for _, name := range images {
		set, _ := s.run(t, "learn-"+name, podSpec{node: on(n), container: server(s.real, name, "v1")})
		wait(t.Context(), 10*time.Second) // a recording ends when nothing new has been read for 5
		noError(t, set.remove(t))
	}
}

// startupBytes is what nodes have fetched by startup profiles so far.
func startupBytes(t *testing.T, nodes []*cluster.Node) (sum float64) {
	t.Helper()
	for _, n := range nodes {
		sum += must(n.Shoal.Metric(t.Context(), `shoal_node_fetched_bytes_total{priority="startup"}`))(t)
	}
	return sum
}
