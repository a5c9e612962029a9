//go:build kubernetes

package kubernetes

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestWithoutHelm: the commands of docs/kubernetes.md, one after the other, on a node that
// runs a pod on overlayfs: the pod goes on, and the next one is lazy. The lab's machines
// have no systemd, so what its commands do is done by the lab.
func TestWithoutHelm(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	n := s.node(t, "plain-quick")
	s.app(t, "before", file{name: "data", data: "before"})
	s.app(t, "after", file{name: "data", data: "after"})
	old, _ := s.run(t, "before", podSpec{node: on(n), container: guest(s.Registry.Addr+"/before:v1", "IfNotPresent")})

	noError(t, n.Write("/etc/shoal/token", string(must(os.ReadFile(s.TokenFile()))(t))))
	restart := func() error {
		if err := n.Containerd.Stop(); err != nil {
			return err
		}
		if err := n.Containerd.Restart(); err != nil {
			return err
		}
		return n.WaitContainerd(ctx)
	}
	inPlace := map[string]func() error{
		"# set supernodes in node.toml": func() error {
			_, err := n.Shell(ctx, fmt.Sprintf("sed -i 's/^supernodes = .*/supernodes = [%q]/' /etc/shoal/node.toml", s.Supernode.Address))
			return err
		},
		"systemctl enable --now shoal-node": func() (err error) {
			n.Shoal, err = n.StartKeptNode(ctx)
			return err
		},
		"shoal install containerd --restart": func() error {
			if _, err := n.Shell(ctx, "shoal install containerd"); err != nil {
				return err
			}
			if err := n.AddMirror(); err != nil { // "Registries with a hosts.toml of their own"
				return err
			}
			return restart()
		},
	}
	for _, line := range commands(t, "../../docs/kubernetes.md", "## Without Helm") {
		t.Log(line)
		if do := inPlace[line]; do != nil {
			delete(inPlace, line)
			noError(t, do())
			continue
		}
		must(n.Shell(ctx, line))(t)
	}
	if len(inPlace) > 0 {
		t.Fatalf("the page lacks commands that this test knows: %v", inPlace)
	}

	ref := s.Registry.Addr + "/after:v1"
	s.run(t, "after", podSpec{node: on(n), container: guest(ref, "IfNotPresent")})
	noError(t, lazy(ctx, n, ref))
	if got := must(old.exec(t, "/guest", "cat", "/data"))(t); got != "before" {
		t.Errorf("the pod from before reads %q", got)
	}
	if st := must(s.Pod(ctx, old.namespace, old.first()))(t); st.Restarts() != 0 {
		t.Errorf("the pod from before was restarted %d times", st.Restarts())
	}
	s.run(t, "again", podSpec{node: on(n), container: guest(s.Registry.Addr+"/before:v1", "IfNotPresent")})
	noError(t, lazy(ctx, n, s.Registry.Addr+"/before:v1"))
}

// commands are the lines of the first indented block below a heading of a page.
func commands(t *testing.T, page, heading string) (all []string) {
	t.Helper()
	_, text, ok := strings.Cut(string(must(os.ReadFile(page))(t)), "\n"+heading+"\n")
	if !ok {
		t.Fatalf("%s has no heading %q", page, heading)
	}
	for line := range strings.Lines(text) {
		if command, ok := strings.CutPrefix(line, "    "); ok {
			all = append(all, strings.TrimSpace(command))
		} else if len(all) > 0 || strings.HasPrefix(line, "#") {
			break
		}
	}
	if len(all) == 0 {
		t.Fatalf("%s has no commands below %q", page, heading)
	}
	return all
}
