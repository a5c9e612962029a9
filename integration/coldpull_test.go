package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// slowRegistry is the link to the registry in TestDrillColdPull: 20 Mbit/s.
const slowRegistry lab.Rate = 20e6 / 8

// coldPull is a machine of TestDrillColdPull.
type coldPull struct {
	*site
	link *lab.Link // to the registry
	// Of the images a is cold and large; b shares a's base layer; warm is there.
	a, b, warm string

	quiet, starts, alone, beside []float64 // seconds
}

// TestDrillColdPull: while a large image is being pulled from a slow registry, and
// garbage collections are due all the time, a pod of another image starts as it
// does with overlayfs, an image that is all at the supernode is pulled as if nothing
// else were going on, and no call of containerd to the snapshotter takes long.
func TestDrillColdPull(t *testing.T) {
	const drill = "cold pull at 20 Mbit/s: "
	n, size := min(rounds(t, 3), 20), 32<<20
	if isDrill() {
		size = 1 << 30
	}
	ctx := t.Context()
	s := &site{Lab: newLab(t)}
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Address, "prepare_timeout = \"3s\"\n"))(t) // the lab's own is longer
	link := must(s.NewLink(s.registry.Addr, slowRegistry, 0))(t)
	base, guest := layer(t, file("base", bigContent(1)+bigContent(2))), must(s.Guest())(t)
	s.push(t, "b", guest, base, layer(t, file("data", bigContent(3))))
	s.push(t, "warm", guest, layer(t, file("data", bigContent(4))))
	s.pushCold(t, "a", size, guest, base)
	pause := must(s.registry.PushPause(ctx))(t)
	for _, repository := range []string{"b", "warm", "pause"} {
		must(s.Run(ctx, "shoal", "prefetch", "--control", s.supernode.Control, link.Addr+"/"+repository+":v1"))(t)
	}
	measure := func(snapshotter string) *coldPull {
		o := lab.ContainerdOptions{CRI: &lab.CRIOptions{Pause: pause, Snapshotter: snapshotter}}
		if snapshotter == "shoal" {
			o.Shoal, o.ShoalRoot, o.Mirror, o.MirrorCA = s.node.Socket, s.node.Root, s.node.Mirror, s.node.MirrorCA
		}
		m := &coldPull{site: &site{Lab: s.Lab, registry: s.registry, supernode: s.supernode, node: s.node}, link: link}
		m.a, m.b, m.warm = link.Addr+"/a:v1", link.Addr+"/b:v1", link.Addr+"/warm:v1"
		m.Containerd = must(s.StartContainerd(ctx, "ctrd-"+snapshotter, o))(t)
		m.measure(t, n, snapshotter == "shoal")
		if len(m.starts) == 0 {
			t.Fatalf("%s: the cold image was there before anything could be measured", snapshotter)
		}
		return m
	}
	overlay := measure("overlayfs")
	shoal := measure("shoal")

	over := func(a, b []float64) float64 { return median(a) / median(b) }
	figure(t, drill+"start of a cached image with a GC due, against overlayfs", "x", report.AtMost, 1.5, over(shoal.starts, overlay.starts))
	figure(t, drill+"pull of an image that shares the base, against alone", "x", report.AtMost, 1.5, over(shoal.beside, shoal.alone))
	longest := must(s.node.Series(ctx, "shoal_node_snapshots_longest_seconds"))(t)
	worst := 0.0
	for _, v := range longest {
		worst = max(worst, v)
	}
	figure(t, drill+"longest snapshots call", "s", report.AtMost, 3, worst)
	figure(t, drill+"snapshots calls of more than 1 s", "%", report.AtMost, 1, 100*s.longCalls(t))
	figure(t, drill+"start of a cached image with a GC due", "s", "", 0, shoal.starts...)
	figure(t, drill+"the same with nothing else going on", "s", "", 0, shoal.quiet...)
	figure(t, drill+"the same with a GC due, overlayfs", "s", "", 0, overlay.starts...)
	figure(t, drill+"pull of an image that shares the base", "s", "", 0, shoal.beside...)
	figure(t, drill+"the same alone", "s", "", 0, shoal.alone...)
	t.Logf("longest calls: %v; starts, seconds: %.2f, quiet %.2f, overlayfs %.2f, quiet %.2f; pulls: %.2f, alone %.2f",
		longest, shoal.starts, shoal.quiet, overlay.starts, overlay.quiet, shoal.beside, shoal.alone)
}

// pushCold pushes an image of these layers and of random bytes above them.
func (s *site) pushCold(t *testing.T, repository string, size int, layers ...lab.Blob) {
	t.Helper()
	const most = 128 << 20
	rng := rand.NewChaCha8([32]byte{1})
	for i := 0; size > 0; i++ {
		data := make([]byte, min(size, most))
		_, _ = rng.Read(data) // it cannot fail
		l := lab.PlainLayer(makeTar(t, file(fmt.Sprint("cold", i), string(data))))
		noError(t, s.registry.PushBlob(t.Context(), repository, l))
		l.Data = nil // it is there
		layers, size = append(layers, l), size-len(data)
	}
	s.push(t, repository, layers...)
}

// measure takes n samples of each, with the large image on its way for the second
// half. pulls: also of the pull of b.
func (m *coldPull) measure(t *testing.T, n int, pulls bool) {
	t.Helper()
	ctx := t.Context()
	noError(t, m.CRI.Pull(ctx, m.warm, nil))
	m.start(t, "first") // pulls the pause image
	for i := range n {
		m.quiet = append(m.quiet, m.start(t, fmt.Sprint("quiet", i)))
		if pulls {
			m.alone = append(m.alone, m.pull(t))
		}
	}
	before := m.link.Down()
	pulling, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- m.CRI.Pull(pulling, m.a, nil) }()
	noError(t, lab.WaitFor(ctx, "bytes of the cold image", time.Minute, func() error {
		if n := m.link.Down() - before; n < 1<<20 {
			return fmt.Errorf("%d bytes have come", n)
		}
		return nil
	}))
	for i := range n {
		collected := m.collect(t, i)
		start := m.start(t, fmt.Sprint("beside", i))
		pull := 0.0
		if pulls {
			pull = m.pull(t)
		}
		noError(t, <-collected)
		select {
		case err := <-done: // these samples are no longer what they should be
			noError(t, err)
			return
		default:
		}
		if m.starts = append(m.starts, start); pulls {
			m.beside = append(m.beside, pull)
		}
	}
	stop() // nobody waits for the rest of it
	<-done
}

// start runs a pod of the warm image until its container answers, and returns how
// long that took, in seconds.
func (m *coldPull) start(t *testing.T, name string) float64 {
	t.Helper()
	ctx := t.Context()
	began := time.Now()
	pod := must(m.CRI.RunPod(ctx, name, lab.PodOptions{}))(t)
	c := must(pod.Start(ctx, "main", m.warm, "/guest", "pause"))(t)
	must(c.Exec(ctx, "/guest", "stat", "/data"))(t)
	took := time.Since(began).Seconds()
	noError(t, pod.Remove(ctx))
	return took
}

// pull pulls b, removes it again, and returns how long the pull took, in seconds.
func (m *coldPull) pull(t *testing.T) float64 {
	t.Helper()
	began := time.Now()
	noError(t, m.CRI.Pull(t.Context(), m.b, nil))
	took := time.Since(began).Seconds()
	if line := logLine(t, m.node.Log, m.b); line != "" {
		t.Errorf("an image that is all at the supernode is not lazy: %s", line)
	}
	noError(t, m.CRI.RemoveImage(t.Context(), m.b))
	return took
}

// collect makes containerd collect garbage, and returns the result once it has.
func (m *coldPull) collect(t *testing.T, i int) <-chan error {
	t.Helper()
	name := fmt.Sprintf("lab.test/garbage:%d", i)
	must(m.Ctr(t.Context(), "-n", "k8s.io", "images", "tag", m.warm, name))(t)
	done := make(chan error, 1)
	go func() {
		_, err := m.Ctr(t.Context(), "-n", "k8s.io", "images", "rm", "--sync", name)
		done <- err
	}()
	return done
}

// longCalls is the part of containerd's calls to the snapshotter that took more than
// a second.
func (s *site) longCalls(t *testing.T) float64 {
	t.Helper()
	var all, quick float64
	for _, v := range must(s.node.Series(t.Context(), "shoal_node_snapshots_seconds_count"))(t) {
		all += v
	}
	for labels, v := range must(s.node.Series(t.Context(), "shoal_node_snapshots_seconds_bucket"))(t) {
		if strings.Contains(labels, `le="1"`) {
			quick += v
		}
	}
	return 1 - quick/all
}

// TestDrillDeadMirror: with a supernode behind a node's mirror that takes
// connections and says nothing, a pull through the mirror takes hardly longer than
// one that does not go there.
func TestDrillDeadMirror(t *testing.T) {
	const drill = "pull through the mirror, everything behind it dead: "
	n := min(rounds(t, 3), 15)
	s := newMirrorSite(t)
	ctx := t.Context()
	node := must(s.StartNode(ctx, "node", s.supernode.Address, "prepare_timeout = \"3s\"\n"))(t)
	through := must(s.StartContainerd(ctx, "mirror", lab.ContainerdOptions{Shoal: node.Socket, Mirror: node.Mirror, MirrorCA: node.MirrorCA}))(t)
	straight := must(s.StartContainerd(ctx, "straight", lab.ContainerdOptions{}))(t)
	ref := s.push(t, "app", layer(t, file("data", bigContent(1))))
	pull := func(c *lab.Containerd, snapshotter string) float64 {
		began := time.Now()
		noError(t, c.Pull(ctx, snapshotter, ref))
		took := time.Since(began).Seconds()
		must(c.Ctr(ctx, "images", "rm", "--sync", ref))(t)
		return took
	}
	var alive, dead, without []float64
	for range n {
		alive = append(alive, pull(through, "overlayfs"))
	}
	noError(t, syscall.Kill(s.supernode.Pid(), syscall.SIGSTOP))
	t.Cleanup(func() { noError(t, syscall.Kill(s.supernode.Pid(), syscall.SIGCONT)) })
	for range n {
		dead = append(dead, pull(through, "overlayfs"))
		without = append(without, pull(straight, "overlayfs"))
	}
	figure(t, drill+"over without the mirror, the first time", "s", report.AtMost, 1, dead[0]-median(without))
	figure(t, drill+"over without the mirror", "s", report.AtMost, 1, median(dead)-median(without))
	figure(t, drill+"time", "s", "", 0, dead...)
	figure(t, drill+"time with the supernode alive", "s", "", 0, alive...)
	figure(t, drill+"time without the mirror", "s", "", 0, without...)
}

// median of some samples, of which there must be one; of an even number the upper.
func median(samples []float64) float64 {
	s := slices.Sorted(slices.Values(samples))
	return s[len(s)/2]
}
