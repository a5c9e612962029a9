package integration

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/shoalfs/shoal/integration/lab"
)

// secret is what kubelet makes of an imagePullSecret.
func secret(user, password string) *runtimeapi.AuthConfig {
	return &runtimeapi.AuthConfig{Username: user, Password: password}
}

// newTenantsSite is a CRI site with the node's mirror, and images of two tenants. The
// node has a credential of its own that opens all images of ann.
func newTenantsSite(t *testing.T, v lab.ContainerdVersion, noAnnotations bool) (*site, *lab.Tenants) {
	t.Helper()
	docker := t.TempDir()
	s := newCRISite(t, v, fmt.Sprintf("docker_config = %q\n", docker), func(s *site, o *lab.ContainerdOptions) {
		o.Mirror, o.MirrorCA, o.CRI.NoAnnotations = s.node.Mirror, s.node.MirrorCA, noAnnotations
	})
	g := must(s.StartTenants(s.registry, map[string]string{"ann": "anns-word", "bob": "bobs-word"}))(t)
	s.pushApp(t, "ann/app", bigContent(1))
	s.pushApp(t, "bob/app", bigContent(2))
	auth := base64.StdEncoding.EncodeToString([]byte("ann:anns-word"))
	noError(t, os.WriteFile(filepath.Join(docker, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, g.Addr, auth), 0o600))
	must(s.Run(t.Context(), "shoal", "prefetch", "--control", s.node.Control, g.Addr+"/ann/app:v1"))(t)
	return s, g
}

// TestImagePullSecrets: private images are lazy for pulls that show a secret which
// the registry takes. The node's own credential opens nothing for them. No secret, a wrong one,
// another tenant's and one that has expired get the registry's refusal, also
// when the image has just been opened for somebody else. No secret is on disk.
func TestImagePullSecrets(t *testing.T) {
	eachContainerd(t, func(t *testing.T, v lab.ContainerdVersion) {
		s, g := newTenantsSite(t, v, false)
		ctx := t.Context()
		ann, bob := g.Addr+"/ann/app:v1", g.Addr+"/bob/app:v1"
		refused := func(why, ref string, auth *runtimeapi.AuthConfig) {
			t.Helper()
			if err := s.CRI.Pull(ctx, ref, auth); err == nil {
				t.Errorf("%s: the pull went through", why)
			}
		}
		refused("no secret", ann, nil)
		refused("a wrong secret", ann, secret("ann", "wrong"))
		refused("another tenant's secret", ann, secret("bob", "bobs-word"))
		if s.isLazy(t, ctx, ann) {
			t.Error("a pull without a right has opened the image")
		}
		for user, ref := range map[string]string{"ann": ann, "bob": bob} {
			noError(t, s.CRI.Pull(ctx, ref, secret(user, user+"s-word")))
			if !s.isLazy(t, ctx, ref) {
				t.Errorf("with %s's secret the image is not lazy: %s", user, logLine(t, s.node.Log, ref))
			}
		}
		pod, c := s.run(t, "ann", ann, lab.PodOptions{})
		if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != bigContent(1) {
			t.Error("the private image has other content than was pushed")
		}
		refused("no secret, of an image that is open", ann, nil)
		refused("another tenant's secret, of an image that is open", ann, secret("bob", "bobs-word"))
		noError(t, pod.Remove(ctx))
		noError(t, s.CRI.RemoveImage(ctx, ann))
		refused("no secret, of an image that was open", ann, nil)
		for _, log := range []string{s.node.Log, s.supernode.Log} {
			if b := string(must(os.ReadFile(log))(t)); strings.Contains(b, "anns-word") {
				t.Errorf("%s has the secret in it", log)
			}
		}
	})
}

// TestImagePullSecretExpires: a secret that the registry takes no more opens nothing,
// and the new one does.
func TestImagePullSecretExpires(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", "registry.access_ttl = \"1s\"\nregistry.access_grace = \"1s\"\n"))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Address, ""))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{
		Shoal: s.node.Socket, ShoalRoot: s.node.Root, Mirror: s.node.Mirror, MirrorCA: s.node.MirrorCA,
		CRI: &lab.CRIOptions{Pause: must(s.registry.PushPause(ctx))(t)},
	}))(t)
	g := must(s.StartTenants(s.registry, map[string]string{"ann": "first"}))(t)
	s.pushApp(t, "ann/app", bigContent(1))
	ref := g.Addr + "/ann/app:v1"
	noError(t, s.CRI.Pull(ctx, ref, secret("ann", "first")))
	noError(t, s.CRI.RemoveImage(ctx, ref))
	g.Rotate("ann", "second")
	// What is known of the first word is believed for a moment.
	noError(t, lab.WaitFor(ctx, "a refusal of the secret that has expired", time.Minute, func() error {
		if s.CRI.Pull(ctx, ref, secret("ann", "first")) != nil {
			return nil
		}
		if err := s.CRI.RemoveImage(ctx, ref); err != nil {
			return err
		}
		return fmt.Errorf("the pull went through")
	}))
	noError(t, s.CRI.Pull(ctx, ref, secret("ann", "second")))
	if !s.isLazy(t, ctx, ref) {
		t.Errorf("with the new secret the image is not lazy: %s", logLine(t, s.node.Log, ref))
	}
}

// TestSpoofingManifest: a public image whose manifest says, in annotations that
// containerd hands on as labels, that its layers are another tenant's image, and
// whose config has that one's DiffIDs, opens nothing of it.
func TestSpoofingManifest(t *testing.T) {
	s, g := newTenantsSite(t, pinned(t), true) // CRI's default: nobody overwrites the annotations
	ctx := t.Context()
	ann := g.Addr + "/ann/app:v1"
	noError(t, s.CRI.Pull(ctx, ann, secret("ann", "anns-word")))
	im := must(s.registry.Image(ctx, "ann/app", "v1"))(t)
	config := must(s.registry.Blob(ctx, "ann/app", im.Config.Digest))(t)
	var all []string
	for _, l := range im.Layers {
		all = append(all, l.Digest)
	}
	var layers []any
	for i, l := range im.Layers {
		layers = append(layers, map[string]any{
			"mediaType": l.MediaType, "digest": l.Digest, "size": l.Size,
			"annotations": map[string]string{
				"containerd.io/snapshot/cri.image-ref":       ann,
				"containerd.io/snapshot/cri.manifest-digest": im.Manifest.String(),
				"containerd.io/snapshot/cri.layer-digest":    l.Digest,
				"containerd.io/snapshot/cri.image-layers":    strings.Join(all[i:], ","),
			},
		})
	}
	// The bytes of the config are changed, so that it is an image of its own.
	config = append(config, '\n')
	cfg := lab.NewBlob(lab.MediaTypeConfig, config)
	manifest := must(json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": lab.MediaTypeManifest, "config": cfg, "layers": layers,
	}))(t)
	g.Serve("public/spoof/manifests/v1", manifest)
	g.Serve("public/spoof/manifests/"+lab.NewBlob("", manifest).Digest, manifest)
	g.Serve("public/spoof/blobs/"+cfg.Digest, config)
	noError(t, s.CRI.RemoveImage(ctx, ann))
	if err := s.CRI.Pull(ctx, g.Addr+"/public/spoof:v1", nil); err == nil {
		t.Error("the image that names another tenant's layers was pulled")
	}
	if s.isLazy(t, ctx, g.Addr+"/public/spoof:v1") || s.isLazy(t, ctx, ann) {
		t.Error("the image that names another tenant's layers has opened them")
	}
}
