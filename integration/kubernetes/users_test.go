//go:build kubernetes

package kubernetes

import (
	"fmt"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/report"
)

// TestPodsWithUserNamespaces: 8 pods with hostUsers: false and ids of which some are
// over 2^31 run one lazy image, with the right owners, and it is not copied.
func TestPodsWithUserNamespaces(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	n := s.node(t, "one")
	s.app(t, "users", file{name: "own", data: "mine", uid: 7, gid: 8}, file{name: "data", data: content(20)})
	ref := s.Registry.Addr + "/users:v1"
	const count = 8
	high := 0
	// kubelet draws the ids by lot.
	for range 4 {
		set, _ := s.run(t, "users", podSpec{n: count, node: on(n), container: guest(ref, "IfNotPresent"), spec: object{"hostUsers": false}})
		noError(t, lazy(ctx, n, ref))
		high = 0
		for i := range count {
			pod := fmt.Sprint("users-", i)
			exec := func(command ...string) string {
				return must(s.Kubectl(ctx, append([]string{"exec", pod, "--"}, command...)...))(t)
			}
			if got, want := exec("/guest", "stat", "/", "/guest", "/own"), "0:0 /\n0:0 /guest\n7:8 /own\n"; got != want {
				t.Errorf("pod %s sees\n%swant\n%s", pod, got, want)
			}
			var inside, outside, length uint64
			must(fmt.Sscan(exec("/guest", "cat", "/proc/self/uid_map"), &inside, &outside, &length))(t)
			if outside == 0 {
				t.Fatalf("pod %s has no user namespace", pod)
			}
			if outside >= 1<<31 {
				high++
			}
		}
		// Containers' own files lie in s/*/fs.
		copied := strings.TrimSpace(must(n.Shell(ctx, "find /var/lib/shoal/s -path '*/i' -prune -o -type f -size +1M -print"))(t))
		if copied != "" {
			t.Errorf("files of the image were copied:\n%s", copied)
		}
		noError(t, set.remove(t))
		if high > 0 {
			break
		}
	}
	if high == 0 {
		t.Fatal("no pod had ids over 2^31")
	}
	figure(t, "pods with hostUsers: false that are Ready, ids over 2^31 among them", "", report.AtLeast, count, count)
	figure(t, "pods with hostUsers: false: ids over 2^31", "", "", 0, float64(high))
}
