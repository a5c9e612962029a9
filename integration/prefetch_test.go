package integration

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// asShipped are the defaults that the lab's nodes do not have.
const asShipped = `prefetch_after_exit = false
prefetch_after_pull = true
prefetch_rate = "64MiB"
`

// slowSite is a site whose node has a link to the supernode of 4 MiB/s.
func slowSite(t *testing.T, nodeConfig string) *site {
	t.Helper()
	s := &site{Lab: newLab(t)}
	s.registry = must(s.StartRegistry(t.Context(), "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", ""))(t)
	link := must(s.NewLink(s.supernode.HostPort(), lab.Rate(4<<20), 0))(t)
	s.node = must(s.StartNode(t.Context(), "node", s.supernode.Via(link), nodeConfig))(t)
	s.Containerd = must(s.StartContainerd(t.Context(), "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	return s
}

// TestPrefetchEndsWithContainer: what a short job leaves unread is not fetched; its
// image's next container has it fetched on.
func TestPrefetchEndsWithContainer(t *testing.T) {
	s := slowSite(t, asShipped)
	ctx := t.Context()
	big, _ := noisy(t, "f", 50, 64)
	ref := s.push(t, "job", must(s.Guest())(t), big)
	noError(t, s.Pull(ctx, "shoal", ref))
	must(s.Ctr(ctx, "run", "--snapshotter", "shoal", ref, "job", "/guest", "stat", "/"))(t) // its snapshot stays
	// It is on its way for as long as the ended container is not noticed.
	var last int64
	noError(t, lab.WaitFor(ctx, "no more bytes", 20*time.Second, func() error {
		local, size, err := s.node.Local(ctx, ref)
		if err != nil {
			return err
		}
		if local == size {
			t.Fatal("all of the image was fetched for a container that had ended")
		}
		if local != last {
			last = local
			time.Sleep(3 * time.Second)
			return fmt.Errorf("%d of %d bytes", local, size)
		}
		return nil
	}))
	must(s.Ctr(ctx, "run", "--detach", "--snapshotter", "shoal", ref, "stays", "/guest", "pause"))(t)
	noError(t, s.node.WaitLocal(ctx, ref, time.Minute))
	must(s.Ctr(ctx, "task", "rm", "--force", "stays"))(t)
}

// TestPrefetchAfterPull: an image is fetched though no container ever runs, and not
// where its rule says otherwise.
func TestPrefetchAfterPull(t *testing.T) {
	s := slowSite(t, asShipped+"[images.prefetch]\n\"*/rare\" = \"startup\"\n")
	ctx := t.Context()
	one, _ := noisy(t, "f", 4, 64)
	two, _ := noisy(t, "g", 4, 64)
	ref, rare := s.push(t, "app", one), s.push(t, "rare", two)
	noError(t, s.Pull(ctx, "shoal", rare))
	noError(t, s.Pull(ctx, "shoal", ref))
	noError(t, s.node.WaitProven(ctx, ref, time.Minute))
	if local, size, err := s.node.Local(ctx, rare); err != nil || local != 0 || size == 0 {
		t.Errorf("%d of %d bytes of an image are here that is not to be prefetched, %v", local, size, err)
	}
}

// TestPortsTaken: with each of its ports in somebody else's hands a node starts,
// and a container on it; when they are free they are its own.
func TestPortsTaken(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	n := must(s.StartNode(ctx, "node", s.supernode.Address, ""))(t)
	noError(t, n.Stop())
	var thieves []net.Listener
	for _, addr := range []string{n.Listen, n.Metrics, n.Mirror} {
		thieves = append(thieves, must(net.Listen("tcp", addr))(t))
	}
	s.node = must(s.RestartNode(ctx, n))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	ref := s.push(t, "app", must(s.Guest())(t))
	noError(t, s.Pull(ctx, "shoal", ref))
	must(s.Ctr(ctx, "run", "--rm", "--snapshotter", "shoal", ref, "c", "/guest", "stat", "/"))(t)
	if !s.isLazy(t, ctx, ref) {
		t.Error("the image is not lazy")
	}
	for _, l := range thieves {
		noError(t, l.Close())
	}
	noError(t, lab.WaitFor(ctx, "all ports", time.Minute, func() error {
		n, err := s.node.Metric(ctx, "shoal_ports_unbound")
		if err == nil && n > 0 {
			err = fmt.Errorf("%v are not bound", n)
		}
		return err
	}))
	// Both are there, and the supernode is told where other nodes find this one.
	for _, addr := range []string{s.node.Mirror, s.node.Listen} {
		conn, err := net.Dial("tcp", addr)
		noError(t, err)
		conn.Close()
	}
	noError(t, lab.WaitFor(ctx, "it has joined again", 30*time.Second, func() error {
		b, err := os.ReadFile(s.node.Log)
		if err == nil && strings.Count(string(b), "joined the supernode") < 2 {
			err = fmt.Errorf("it has not")
		}
		return err
	}))
}

// TestMirrorPortIsKept: while a node that is kept is killed again and again, nobody
// else gets the port of its mirror.
func TestMirrorPortIsKept(t *testing.T) {
	s := newKeptSite(t, 0)
	done := make(chan struct{})
	stolen := make(chan net.Listener, 1)
	go func() {
		defer close(stolen)
		for {
			select {
			case <-done:
				return
			default:
			}
			if l, err := net.Listen("tcp", s.node.Mirror); err == nil {
				stolen <- l
				return
			}
		}
	}()
	for range 5 {
		must(s.node.KillNode(t.Context()))(t)
		noError(t, lab.WaitFor(t.Context(), "node", 20*time.Second, func() error {
			_, err := s.node.Status(t.Context())
			return err
		}))
	}
	close(done)
	if l := <-stolen; l != nil {
		noError(t, l.Close())
		t.Error("somebody else got the port of the mirror")
	}
}
