package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// newCRISite is a site whose containerd is driven as kubelet drives it, through CRI.
// change, if not nil, changes how containerd is started.
func newCRISite(t *testing.T, v lab.ContainerdVersion, nodeConfig string, change func(*site, *lab.ContainerdOptions)) *site {
	t.Helper()
	s := &site{Lab: newLab(t)}
	s.registry = must(s.StartRegistry(t.Context(), "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", ""))(t)
	s.node = must(s.StartNode(t.Context(), "node", s.supernode.Address, nodeConfig))(t)
	o := lab.ContainerdOptions{
		Binary: v.Binary, ConfigVersion: v.ConfigVersion, Shoal: s.node.Socket, ShoalRoot: s.node.Root,
		CRI: &lab.CRIOptions{Pause: must(s.registry.PushPause(t.Context()))(t)},
	}
	if change != nil {
		change(s, &o)
	}
	s.Containerd = must(s.StartContainerd(t.Context(), "ctrd", o))(t)
	return s
}

// pinned is the containerd of tests that need one only.
func pinned(t *testing.T) lab.ContainerdVersion {
	t.Helper()
	return (&lab.Lab{Bin: bin(t)}).ContainerdVersions()[0]
}

// eachContainerd runs a test with every containerd that the lab has.
func eachContainerd(t *testing.T, test func(*testing.T, lab.ContainerdVersion)) {
	l := &lab.Lab{Bin: bin(t)} // skips without root
	for _, v := range l.ContainerdVersions() {
		t.Run(v.Name, func(t *testing.T) { test(t, v) })
	}
}

// pushApp pushes an image that pods can run, with one file /data of its own, and
// returns its reference.
func (s *site) pushApp(t *testing.T, repository, data string) string {
	t.Helper()
	return s.push(t, repository, must(s.Guest())(t), layer(t, file("data", data)))
}

// run runs a pod and in it a container of ref that waits; both go with the test.
func (s *site) run(t *testing.T, name, ref string, o lab.PodOptions) (*lab.Pod, *lab.PodContainer) {
	t.Helper()
	pod := must(s.CRI.RunPod(t.Context(), name, o))(t)
	return pod, must(pod.Start(t.Context(), "main", ref, "/guest", "pause"))(t)
}

// TestPodIsLazy: a pod's image, pulled through CRI, is lazy; its container starts,
// reads what is in the image, and when pod and image are removed nothing is left.
func TestPodIsLazy(t *testing.T) {
	eachContainerd(t, func(t *testing.T, v lab.ContainerdVersion) {
		s := newCRISite(t, v, "", nil)
		ctx := t.Context()
		data := bigContent(1)
		ref := s.pushApp(t, "app", data)
		noError(t, s.CRI.Pull(ctx, ref, nil))
		if !s.isLazy(t, ctx, ref) {
			t.Fatalf("the image is not lazy: %s", logLine(t, s.node.Log, ref))
		}
		pod, c := s.run(t, "pod", ref, lab.PodOptions{})
		if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != data {
			t.Errorf("the container reads %d bytes that are not those of the image (%d bytes)", len(got), len(data))
		}
		noError(t, pod.Remove(ctx))
		refs := must(s.CRI.Images(ctx))(t)
		if len(refs) != 2 {
			t.Errorf("CRI lists %q, want the image and that of the sandbox", refs)
		}
		for _, ref := range refs {
			noError(t, s.CRI.RemoveImage(ctx, ref))
		}
		noError(t, lab.WaitFor(ctx, "nothing left of pod and images", 20*time.Second, func() error {
			mounts, err := s.Mounts()
			if err != nil {
				return err
			}
			for _, m := range mounts {
				if strings.HasPrefix(m, s.node.Root+"/m/") {
					return fmt.Errorf("%s is mounted", m)
				}
			}
			if st, err := s.node.Status(ctx); err != nil || len(st.Images) > 0 {
				return fmt.Errorf("images %v, %w", st, err)
			}
			return nil
		}))
	})
}
