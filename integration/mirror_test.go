package integration

import (
	"archive/tar"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// machine starts a node and a containerd that pulls through the node's mirror.
func (s *site) machine(t *testing.T, name, nodeConfig string) (*lab.Node, *lab.Containerd) {
	t.Helper()
	n := must(s.StartNode(t.Context(), name, s.supernode.Address, nodeConfig))(t)
	return n, must(s.StartContainerd(t.Context(), name+"-ctrd", lab.ContainerdOptions{Shoal: n.Socket, Mirror: n.Mirror, MirrorCA: n.MirrorCA}))(t)
}

func newMirrorSite(t *testing.T) *site {
	t.Helper()
	s := &site{Lab: newLab(t)}
	s.registry = must(s.StartRegistry(t.Context(), "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", ""))(t)
	return s
}

// TestMirror: through the mirror, the second node's pull costs the registry
// nothing, by tag, by digest and of an image index; and with the registry gone a
// new node pulls and runs an image that only `shoal prefetch` has ever asked for.
func TestMirror(t *testing.T) {
	s := newMirrorSite(t)
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, dir("bin/"), file("bin/true", bigContent(1))))
	s.push(t, "pinned", layer(t, dir("p/"), file("p/f", bigContent(3))))
	byDigest := s.registry.Addr + "/pinned@" + must(s.registry.Image(ctx, "pinned", "v1"))(t).Manifest.String()
	multi := s.pushIndex(t, "multi", layer(t, dir("d/"), file("d/f", bigContent(2))))
	// The one static program that is surely there.
	program := string(must(os.ReadFile(filepath.Join(s.Bin, "shoal")))(t))
	executable := file("shoal", program).with(func(h *tar.Header) { h.Mode = 0o755 })
	must(s.registry.Push(ctx, "static", "v1", []string{"/shoal", "version"}, layer(t, executable)))(t)
	static := s.registry.Addr + "/static:v1"

	_, first := s.machine(t, "one", "")
	for _, r := range []string{ref, byDigest, multi} {
		noError(t, first.Pull(ctx, "shoal", r))
	}
	must(s.Run(ctx, "shoal", "prefetch", "--control", s.supernode.Control, static))(t)

	requests := must(s.registry.Requests(ctx))(t)
	node, second := s.machine(t, "two", "")
	for _, r := range []string{ref, byDigest, multi, static} {
		noError(t, second.Pull(ctx, "shoal", r))
		if !listed(t, node, r) {
			t.Errorf("%s is not lazy on the second node", r)
		}
	}
	if n := must(s.registry.Requests(ctx))(t) - requests; n != 0 {
		t.Errorf("the second node's pulls cost the registry %d requests, want none", n)
	}

	noError(t, s.registry.Stop())
	node, third := s.machine(t, "three", "")
	for _, r := range []string{ref, byDigest, multi, static} {
		noError(t, third.Pull(ctx, "shoal", r))
		if !listed(t, node, r) {
			t.Errorf("with the registry gone, %s is not lazy on a new node", r)
		}
	}
	must(third.RunReady(ctx, "shoal", static, true))(t)
	if err := third.Pull(ctx, "shoal", s.registry.Addr+"/never:seen"); err == nil {
		t.Error("an image that nobody has was pulled")
	}
}

// pushIndex pushes an image of these layers behind an image index, as a build for
// several platforms does it.
func (s *site) pushIndex(t *testing.T, repository string, layers ...lab.Blob) string {
	t.Helper()
	ctx := t.Context()
	s.push(t, repository, layers...)
	im := must(s.registry.Image(ctx, repository, "v1"))(t)
	head := must(http.NewRequestWithContext(ctx, http.MethodHead, "http://"+s.registry.Addr+"/v2/"+repository+"/manifests/v1", nil))(t)
	head.Header.Set("Accept", lab.MediaTypeManifest)
	size := must(http.DefaultClient.Do(head))(t).ContentLength
	index := must(json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": lab.MediaTypeIndex,
		"manifests": []any{map[string]any{
			"mediaType": lab.MediaTypeManifest, "digest": im.Manifest, "size": size,
			"platform": map[string]string{"os": "linux", "architecture": "amd64"},
		}},
	}))(t)
	must(s.registry.PushManifest(ctx, repository, "multi", lab.MediaTypeIndex, index))(t)
	return s.registry.Addr + "/" + repository + ":multi"
}

// TestMirrorAccess: a private image is lazy for a pull that shows a credential which
// the registry takes, with nothing configured on the node; the registry is asked
// once for all nodes. A pull that shows none, or a wrong one, gets the registry's own
// refusal, whatever the node's credential opens and other pulls have shown; so it
// does with the node's credential unless the config says otherwise.
func TestMirrorAccess(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	open := must(l.StartRegistry(ctx, "open", l.Path("images"), ""))(t)
	must(open.Push(ctx, "secret/app", "v1", []string{"/bin/true"}, layer(t, dir("d/"), file("d/f", bigContent(1)))))(t)
	gate := newTokenGate(t, open.Addr)
	gate.rotate("s3cret-word")
	s := &site{Lab: l, registry: open}
	s.supernode = must(l.StartSupernode(ctx, "super", ""))(t)
	ref := gate.addr + "/secret/app:v1"
	docker := l.Path("docker")
	noError(t, os.MkdirAll(docker, 0o700))
	auth := base64.StdEncoding.EncodeToString([]byte("ann:s3cret-word"))
	noError(t, os.WriteFile(filepath.Join(docker, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, gate.addr, auth), 0o600))
	config := fmt.Sprintf("docker_config = %q\n", docker)

	node, ctrd := s.machine(t, "ann", config)
	for _, c := range []struct{ name, user, said string }{
		{"none", "", "401 Unauthorized"},
		{"wrong", "ann:wrong", "401 Unauthorized"},
		// The supernode knows by now that the repository is not public.
		{"none, again", "", "the registry wants a credential, and the request has none"},
	} {
		var extra []string
		if c.user != "" {
			extra = []string{"--user", c.user}
		}
		err := ctrd.Pull(ctx, "shoal", ref, extra...)
		if err == nil {
			t.Errorf("credential %s: the pull went through", c.name)
			continue
		}
		said, _, _ := strings.Cut(err.Error(), "containerd's log ends")
		if strings.Contains(said, node.Mirror) || !strings.Contains(said, c.said) {
			t.Errorf("credential %s: got %v, want the registry's own refusal (%s)", c.name, err, c.said)
		}
	}
	if listed(t, node, ref) {
		t.Error("a pull without a right has opened the image")
	}
	noError(t, ctrd.Pull(ctx, "shoal", ref, "--user", "ann:s3cret-word"))
	if !listed(t, node, ref) {
		t.Errorf("with the credential the image is not lazy: %s", logLine(t, node.Log, ref))
	}
	requests := must(s.registry.Requests(ctx))(t)
	node2, ctrd2 := s.machine(t, "anna", "")
	noError(t, ctrd2.Pull(ctx, "shoal", ref, "--user", "ann:s3cret-word"))
	if n := must(s.registry.Requests(ctx))(t) - requests; n != 0 || !listed(t, node2, ref) {
		t.Errorf("the second node with the credential cost the registry %d requests, want none", n)
	}
	// Somebody else on that machine, when the image has just been there.
	noError(t, removeImage(ctx, ctrd2, ref))
	if err := ctrd2.Pull(ctx, "shoal", ref); err == nil {
		t.Error("without a credential the pull went through")
	}

	node3, ctrd3 := s.machine(t, "all", config+"node_credentials_for_pulls = true\n")
	noError(t, ctrd3.Pull(ctx, "shoal", ref))
	if !listed(t, node3, ref) {
		t.Error("node_credentials_for_pulls: the image is not lazy")
	}
	for _, log := range []string{node.Log, node2.Log, node3.Log, s.supernode.Log} {
		if b := string(must(os.ReadFile(log))(t)); strings.Contains(b, "s3cret-word") || strings.Contains(b, auth) {
			t.Errorf("%s has the secret in it", log)
		}
	}
	noError(t, filepath.WalkDir(node2.Root, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(b), "s3cret-word") {
			t.Errorf("%s has the secret in it", path)
		}
		return err
	}))
}

// TestHeadOnlyPull: a private image for several platforms of which containerd has all
// but the snapshots, so that its pull asks for nothing but what the tag names, is lazy for
// a pull with a credential, and for no other.
func TestHeadOnlyPull(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	s := &site{Lab: l, registry: must(l.StartRegistry(ctx, "open", l.Path("images"), ""))(t)}
	_, repository, _ := strings.Cut(s.pushIndex(t, "secret/app", layer(t, dir("d/"), file("d/f", bigContent(1)))), "/")
	gate := newTokenGate(t, s.registry.Addr)
	gate.rotate("s3cret-word")
	s.supernode = must(l.StartSupernode(ctx, "super", ""))(t)
	ref := gate.addr + "/" + repository
	node, ctrd := s.machine(t, "ann", "")
	noError(t, ctrd.Pull(ctx, "overlayfs", ref, "--user", "ann:s3cret-word"))
	noError(t, node.Stop())
	node = must(s.RestartNode(ctx, node))(t) // it forgets what that pull has shown
	if listed(t, node, ref) {
		t.Fatal("the image is lazy before it was pulled for shoal")
	}
	noError(t, ctrd.Pull(ctx, "shoal", ref, "--user", "ann:s3cret-word"))
	if !listed(t, node, ref) {
		t.Errorf("the image is not lazy: %s", logLine(t, node.Log, ref))
	}
}

func removeImage(ctx context.Context, c *lab.Containerd, ref string) error {
	_, err := c.Ctr(ctx, "images", "rm", "--sync", ref)
	return err
}

// TestMirrorBrokenCredentials: a config.json that cannot be read is said where it
// matters, and kept from nobody's pull.
func TestMirrorBrokenCredentials(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	open := must(l.StartRegistry(ctx, "open", l.Path("images"), ""))(t)
	must(open.Push(ctx, "secret/app", "v1", []string{"/bin/true"}, layer(t, dir("d/"), file("d/f", bigContent(1)))))(t)
	gate := newTokenGate(t, open.Addr)
	gate.rotate("s3cret-word")
	s := &site{Lab: l, registry: open}
	s.supernode = must(l.StartSupernode(ctx, "super", ""))(t)
	broken := l.Path("broken")
	noError(t, os.MkdirAll(broken, 0o700))
	noError(t, os.WriteFile(filepath.Join(broken, "config.json"), []byte(`{"auths":`), 0o600))
	other, _ := s.machine(t, "bob", fmt.Sprintf("docker_config = %q\n", broken))
	_, err := l.Run(ctx, "shoal", "prefetch", "--control", other.Control, gate.addr+"/secret/app:v1")
	if err == nil || !strings.Contains(err.Error(), "denied") || !strings.Contains(err.Error(), "config.json") {
		t.Errorf("prefetch: got %v, want an error that says that access is denied, and that config.json is broken", err)
	}
	if n := strings.Count(string(must(os.ReadFile(other.Log))(t)), "config.json is broken"); n != 1 {
		t.Errorf("the log says %d times that config.json is broken, want once", n)
	}
}

// TestMirrorSquatter: whoever has the mirror's port while shoal has not is told
// nothing by containerd, whether it speaks HTTP, or TLS with a certificate of its own.
func TestMirrorSquatter(t *testing.T) {
	s := newMirrorSite(t)
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, dir("d/"), file("d/f", bigContent(1))))
	node, ctrd := s.machine(t, "one", "")
	noError(t, node.Stop())
	var asked atomic.Int64
	thief := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	for _, start := range []func(*httptest.Server){(*httptest.Server).Start, (*httptest.Server).StartTLS} {
		squatter := httptest.NewUnstartedServer(thief)
		noError(t, squatter.Listener.Close())
		squatter.Listener = must(net.Listen("tcp", node.Mirror))(t)
		start(squatter)
		noError(t, ctrd.Pull(ctx, "overlayfs", ref, "--user", "ann:s3cret-word"))
		noError(t, removeImage(ctx, ctrd, ref))
		squatter.Close()
	}
	if n := asked.Load(); n > 0 {
		t.Errorf("containerd sent whoever had the port %d requests", n)
	}
}

// TestMirrorRefusesWrongBytes: what a registry sends in place of a manifest
// reaches nobody and is not kept.
func TestMirrorRefusesWrongBytes(t *testing.T) {
	s := newMirrorSite(t)
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, dir("d/"), file("d/f", bigContent(1))))
	node, ctrd := s.machine(t, "one", "")
	im := must(s.registry.Image(ctx, "app", "v1"))(t)
	hex := im.Manifest.Encoded()
	blob := s.Path("images", "docker", "registry", "v2", "blobs", "sha256", hex[:2], hex, "data")
	right := must(os.ReadFile(blob))(t)
	wrong := strings.Replace(string(right), `"schemaVersion":2`, `"schemaVersion": 2`, 1)
	if wrong == string(right) {
		t.Fatalf("the manifest is not as this test expects: %s", right)
	}
	noError(t, os.WriteFile(blob, []byte(wrong), 0o644))
	// If the supernode's answer takes longer than the mirror waits, then the mirror leaves the
	// manifest to the registry, and containerd alone refuses it.
	noError(t, lab.WaitFor(ctx, "the mirror to refuse the manifest", time.Minute, func() error {
		if err := ctrd.Pull(ctx, "shoal", s.registry.Addr+"/app@"+im.Manifest.String()); err == nil {
			t.Fatal("a manifest with another digest was taken")
		}
		if line := logLine(t, node.Log, im.Manifest.String()); !strings.Contains(line, "502") {
			return fmt.Errorf("the node's log does not say it: %q", line)
		}
		return nil
	}))
	noError(t, os.WriteFile(blob, right, 0o644))
	// A containerd of its own: the first one keeps what it has fetched so far.
	second, ctrd2 := s.machine(t, "two", "")
	noError(t, ctrd2.Pull(ctx, "shoal", ref))
	if !listed(t, second, ref) {
		t.Error("with the registry repaired the image is not lazy")
	}
}

// TestMirrorOnOneMachine: a node that embeds its supernode shares containerd's
// hosts.toml with it, and so finds itself there as a mirror. Nothing goes in
// circles, and a registry's refusal is seen through it.
func TestMirrorOnOneMachine(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	certs := s.Path("ctrd", "certs.d")
	node := must(s.StartNode(ctx, "node", "", fmt.Sprintf("[embedded.registry]\nconfig_path = %q\n", certs)))(t)
	ctrd := must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: node.Socket, Mirror: node.Mirror, MirrorCA: node.MirrorCA}))(t)
	ref := s.push(t, "app", layer(t, dir("d/"), file("d/f", bigContent(1))))
	noError(t, ctrd.Pull(ctx, "shoal", ref))
	if !listed(t, node, ref) {
		t.Error("the image is not lazy")
	}
	_, err := s.Run(ctx, "shoal", "prefetch", "--control", node.Control, s.registry.Addr+"/no/such:image")
	if err == nil || !strings.Contains(err.Error(), "not found") || strings.Contains(err.Error(), "508") {
		t.Errorf("an image that is not there: %v, want the registry's own word", err)
	}
}

// TestCheckOneMachine: a running node that embeds its supernode checks that one's store, too.
func TestCheckOneMachine(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	node := must(s.StartNode(ctx, "node", "", ""))(t)
	ref := s.push(t, "app", layer(t, dir("d/"), file("d/f", bigContent(1))))
	must(s.Run(ctx, "shoal", "prefetch", "--control", node.Control, ref))(t) // to the store alone
	var report struct {
		Layers, Chunks int
		Result         string
	}
	out := must(s.Run(ctx, "shoal", "check", "--control", node.Control, "--output", "json"))(t)
	noError(t, json.Unmarshal([]byte(out), &report))
	if report.Layers != 1 || report.Chunks == 0 || report.Result != "clean" {
		t.Errorf("the store has one layer, and the check says %s", out)
	}
}
