package registry_test

import (
	"bytes"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestBasics runs the same questions against the fake and against a real
// registry, so that what the other tests learn from the fake is worth something.
func TestBasics(t *testing.T) {
	users := map[string]string{registrytest.RealUser: registrytest.RealPassword}
	onlyAlice := func(user, _ string) bool { return user == registrytest.RealUser }
	fake := func(a registrytest.Auth) func(t *testing.T) registrytest.Target {
		return func(t *testing.T) registrytest.Target {
			f := registrytest.NewFake(t)
			if a != registrytest.Open {
				f.SetAuth(a, users, onlyAlice)
				f.User, f.Password = registrytest.RealUser, registrytest.RealPassword
			}
			return f.Target
		}
	}
	for name, start := range map[string]func(t *testing.T) registrytest.Target{
		"fake":        fake(registrytest.Open),
		"fake-basic":  fake(registrytest.Basic),
		"fake-bearer": fake(registrytest.Bearer),
		"real":        func(t *testing.T) registrytest.Target { return registrytest.StartReal(t, false) },
		"real-basic":  func(t *testing.T) registrytest.Target { return registrytest.StartReal(t, true) },
	} {
		t.Run(name, func(t *testing.T) { basics(t, start(t)) })
	}
}

func basics(t *testing.T, reg registrytest.Target) {
	layers := []registrytest.Layer{registrytest.GzipLayer(t, "a", 300_000, 1), registrytest.GzipLayer(t, "b", 10, 2)}
	oci := reg.Push(t, "team/app", "v1", layers...)
	docker := reg.PushAs(t, "team/app", "docker", registrytest.TypeDocker, registrytest.Platform{OS: "linux", Architecture: "amd64"}, func() (d []registrytest.Layer) {
		for _, l := range layers {
			l.MediaType = "application/vnd.docker.image.rootfs.diff.tar.gzip"
			d = append(d, l)
		}
		return d
	}()...)
	arm := reg.PushAs(t, "team/app", "arm", registrytest.TypeManifest, registrytest.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, layers[1])
	index := registrytest.JSON(t, map[string]any{"schemaVersion": 2, "mediaType": registrytest.TypeIndex, "manifests": []registrytest.Descriptor{
		{MediaType: registrytest.TypeManifest, Digest: arm, Size: 1, Platform: &registrytest.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}},
		{MediaType: registrytest.TypeManifest, Digest: oci, Size: 1, Platform: &registrytest.Platform{OS: "linux", Architecture: "amd64"}},
	}})
	multi := reg.PushManifest(t, "team/app", "multi", registrytest.TypeIndex, index)

	c := newClient(t)
	cred := credOf(reg)
	name := reg.Host + "/team/app"
	resolve := func(ref string, d blockdev.Digest, p image.Platform) (*registry.Manifest, error) {
		return c.Resolve(t.Context(), image.Request{Ref: ref, Manifest: d, Platform: p, Credential: cred})
	}
	for _, tc := range []struct {
		what   string
		ref    string
		given  blockdev.Digest
		p      image.Platform
		want   blockdev.Digest
		layers int
	}{
		{"tag", name + ":v1", blockdev.Digest{}, amd64, oci, 2},
		{"digest", name + ":v1", oci, amd64, oci, 2},
		{"digest in ref", name + "@" + oci.String(), blockdev.Digest{}, amd64, oci, 2},
		{"digest wins over tag", name + ":v1@" + docker.String(), blockdev.Digest{}, amd64, docker, 2},
		{"docker", name + ":docker", blockdev.Digest{}, amd64, docker, 2},
		{"index, amd64", name + ":multi", blockdev.Digest{}, amd64, oci, 2},
		{"index, arm64", name + ":multi", multi, image.Platform{OS: "linux", Architecture: "arm64"}, arm, 1},
	} {
		m, err := resolve(tc.ref, tc.given, tc.p)
		if err != nil {
			t.Errorf("%s: %v", tc.what, err)
			continue
		}
		if m.Digest != tc.want || len(m.Layers) != tc.layers || m.Host != reg.Host || m.Repository != "team/app" || m.Ref != tc.ref {
			t.Errorf("%s: %+v", tc.what, m)
		}
	}
	_, err := resolve(name+":multi", blockdev.Digest{}, image.Platform{OS: "linux", Architecture: "s390x"})
	wantError(t, err, blockdev.ErrNotFound, "linux/s390x", ":multi")
	_, err = resolve(name+":none", blockdev.Digest{}, amd64)
	wantError(t, err, blockdev.ErrNotFound, ":none")
	_, err = resolve(name+":v1", blockdev.Sum([]byte("no such")), amd64)
	wantError(t, err, blockdev.ErrNotFound, ":v1")

	m, err := resolve(name+":v1", blockdev.Digest{}, amd64)
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range layers {
		if got := m.Layers[i]; got.DiffID != l.DiffID || got.Digest != blockdev.Sum(l.Blob) || got.Size != int64(len(l.Blob)) {
			t.Errorf("layer %d: %+v", i, got)
		}
		for _, off := range []int64{0, 1, int64(len(l.Blob)) / 2, int64(len(l.Blob)) - 1, int64(len(l.Blob))} {
			b, err := fetch(t.Context(), c, m, i, cred, off)
			if err != nil || !bytes.Equal(b, l.Blob[off:]) {
				t.Errorf("layer %d from %d: %d bytes, %v", i, off, len(b), err)
			}
		}
	}
	if _, err := fetch(t.Context(), c, m, 0, cred, m.Layers[0].Size+1); err == nil {
		t.Error("an offset beyond the end is accepted")
	}

	if err := c.Check(t.Context(), name+":v1", blockdev.Digest{}, cred); err != nil {
		t.Errorf("check by tag: %v", err)
	}
	if err := c.Check(t.Context(), name+":v1", multi, cred); err != nil {
		t.Errorf("check by digest: %v", err)
	}
	wantError(t, c.Check(t.Context(), reg.Host+"/team/other:v1", oci, cred), blockdev.ErrNotFound)
	if reg.User != "" {
		for _, bad := range []image.Credential{{}, {Username: reg.User, Secret: "wrong"}, {Username: "mallory", Secret: reg.Password}} {
			wantError(t, c.Check(t.Context(), name+":v1", oci, bad), blockdev.ErrUnauthorized, name)
			_, err := fetch(t.Context(), c, m, 0, bad, 0)
			wantError(t, err, blockdev.ErrUnauthorized)
		}
		if err := c.Check(t.Context(), name+":v1", oci, cred); err != nil {
			t.Errorf("check after refusals: %v", err)
		}
	}
}
