package integration

import (
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestPrivateImage: with docker's credential for the registry a private image is
// lazy; without it the supernode hands out nothing, though it has the layers, and
// containerd meets the registry's own refusal.
func TestPrivateImage(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	storage := l.Path("images")
	open := must(l.StartRegistry(ctx, "open", storage, ""))(t)
	if _, err := open.Push(ctx, "secret/app", "v1", []string{"/bin/true"}, layer(t, dir("d/"), file("d/f", bigContent(1)))); err != nil {
		t.Fatal(err)
	}
	if err := open.Stop(); err != nil {
		t.Fatal(err)
	}
	hash, err := exec.CommandContext(ctx, "htpasswd", "-nbB", "ann", "s3cret-word").Output()
	if err != nil {
		t.Fatalf("htpasswd: %v: `make setup` installs it", err)
	}
	htpasswd := l.Path("htpasswd")
	if err := os.WriteFile(htpasswd, hash, 0o600); err != nil {
		t.Fatal(err)
	}
	private := must(l.StartRegistry(ctx, "private", storage, htpasswd))(t)
	ref := private.Addr + "/secret/app:v1"

	super := must(l.StartSupernode(ctx, "super", ""))(t)
	docker := l.Path("docker")
	if err := os.MkdirAll(docker, 0o700); err != nil {
		t.Fatal(err)
	}
	auth := base64.StdEncoding.EncodeToString([]byte("ann:s3cret-word"))
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, private.Addr, auth)
	if err := os.WriteFile(filepath.Join(docker, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := l.Path("empty")
	if err := os.MkdirAll(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	nodeFor := func(name, dir string) (*lab.Node, *lab.Containerd) {
		n := must(l.StartNode(ctx, name, super.Address, fmt.Sprintf("docker_config = %q\n", dir)))(t)
		return n, must(l.StartContainerd(ctx, name+"-ctrd", lab.ContainerdOptions{Shoal: n.Socket}))(t)
	}
	node, ctrd := nodeFor("ann", docker)
	if err := ctrd.Pull(ctx, "shoal", ref, "--user", "ann:s3cret-word"); err != nil {
		t.Fatal(err)
	}
	if !listed(t, node, ref) {
		t.Error("with the credential the image is not lazy")
	}
	other, ctrd2 := nodeFor("bob", empty)
	if err := ctrd2.Pull(ctx, "shoal", ref); err == nil {
		t.Error("without a credential the pull went through")
	}
	if listed(t, other, ref) {
		t.Error("without a credential the image is lazy on the node")
	}
	_, err = l.Run(ctx, "shoal", "prefetch", "--control", other.Control, ref)
	if err == nil || !strings.Contains(err.Error(), "denied") {
		t.Errorf("prefetch without a credential: got %v, want an error that says that access is denied", err)
	}
	for _, log := range []string{node.Log, super.Log, other.Log} {
		if b := must(os.ReadFile(log))(t); strings.Contains(string(b), "s3cret-word") || strings.Contains(string(b), auth) {
			t.Errorf("%s has the secret in it", log)
		}
	}
}

// listed says whether a node has ref as a lazy image.
func listed(t *testing.T, n *lab.Node, ref string) bool {
	t.Helper()
	for _, im := range must(n.Status(t.Context()))(t).Images {
		if im.Ref == ref {
			return true
		}
	}
	return false
}
