//go:build kubernetes

package kubernetes

import (
	"crypto/sha256"
	"fmt"
	"testing"
)

// TestImageVolume: an image that is a pod's volume is lazy, read-only, and has its files.
func TestImageVolume(t *testing.T) {
	s := newSite(t)
	n := s.node(t, "one")
	data := content(30)
	s.app(t, "program", file{name: "empty"})
	s.app(t, "model", file{name: "weights", data: data})
	ref := s.Registry.Addr + "/model:v1"
	container := guest(s.Registry.Addr+"/program:v1", "IfNotPresent")
	container["volumeMounts"] = []object{{"name": "model", "mountPath": "/tmp"}}
	set, _ := s.run(t, "volume", podSpec{n: 2, node: on(n), container: container, spec: object{
		"volumes": []object{{"name": "model", "image": object{"reference": ref, "pullPolicy": "IfNotPresent"}}},
	}})
	noError(t, lazy(t.Context(), n, ref))
	want := fmt.Sprintf("%x  /tmp/weights\n", sha256.Sum256([]byte(data)))
	if got := must(set.exec(t, "/guest", "sum", "/tmp/weights"))(t); got != want {
		t.Errorf("the container reads %q, want %q", got, want)
	}
	if out, err := set.exec(t, "/guest", "touch", "/tmp/new"); err == nil {
		t.Errorf("the volume can be written to: %s", out)
	}
}
