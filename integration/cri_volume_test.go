package integration

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/shoalfs/shoal/integration/lab"
)

// eachVolumes runs a test with every containerd that knows images as volumes of pods.
func eachVolumes(t *testing.T, test func(*testing.T, lab.ContainerdVersion)) {
	for _, v := range (&lab.Lab{Bin: bin(t)}).ContainerdVersions() {
		if v.ConfigVersion >= 3 { // containerd 1.6 has none
			t.Run(v.Name, func(t *testing.T) { test(t, v) })
		}
	}
}

// startWith starts a container of ref that waits and has these mounts.
func startWith(ctx context.Context, pod *lab.Pod, name, ref string, mounts ...*runtimeapi.Mount) (*lab.PodContainer, error) {
	return pod.StartConfig(ctx, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: ref},
		Command:  []string{"/guest", "pause"},
		Mounts:   mounts,
	})
}

// sumOf is what the guest prints as the sum of a file.
func sumOf(name, data string) string {
	return fmt.Sprintf("%x  %s\n", sha256.Sum256([]byte(data)), name)
}

// removeAll removes all images, and waits until nothing of them, and of volumes, is left.
func (s *site) removeAll(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	for _, ref := range must(s.CRI.Images(ctx))(t) {
		noError(t, s.CRI.RemoveImage(ctx, ref))
	}
	// An image that the mirror has opened for a pull that has all layers is held for a minute.
	noError(t, lab.WaitFor(ctx, "nothing left of pods and images", 90*time.Second, func() error {
		mounts, err := s.Mounts()
		if err != nil {
			return err
		}
		for _, m := range mounts {
			if strings.HasPrefix(m, s.node.Root+"/m/") || strings.Contains(m, "/image-volumes/") {
				return fmt.Errorf("%s is mounted", m)
			}
		}
		out, err := s.Ctr(ctx, "-n", "k8s.io", "snapshots", "--snapshotter", "shoal", "ls")
		if err == nil && strings.Count(out, "\n") > 1 { // the head of the table
			err = fmt.Errorf("snapshots:\n%s", out)
		}
		if err != nil {
			return err
		}
		if st, err := s.node.Status(ctx); err != nil || len(st.Images) > 0 {
			return fmt.Errorf("images %v, %w", st, err)
		}
		return nil
	}))
}

// TestImageVolume: an image is a lazy, read-only volume of containers of several pods,
// and so is a directory of it. An image that is removed while volumes have it can still be
// read, also bytes that were missing. When the pods are gone, nothing is left.
func TestImageVolume(t *testing.T) {
	eachVolumes(t, func(t *testing.T, v lab.ContainerdVersion) {
		s := newCRISite(t, v, "prefetch = \"none\"\n", nil)
		ctx := t.Context()
		late := content(7, 8<<20)
		ref, volume := s.pushApp(t, "app", "x"), s.push(t, "volume", layer(t,
			dir("a/"), dir("a/b/"), file("a/b/one", bigContent(5)), symlink("out", "../../.."), file("two", bigContent(6)), file("late", late)))
		noError(t, s.CRI.Pull(ctx, ref, nil))
		noError(t, s.CRI.Pull(ctx, volume, nil))
		if !s.isLazy(t, ctx, volume) {
			t.Fatalf("the image is not lazy: %s", logLine(t, s.node.Log, volume))
		}
		id := must(s.CRI.ImageID(ctx, volume))(t) // as kubelet names it
		var pods []*lab.Pod
		var containers []*lab.PodContainer
		for _, name := range []string{"one", "two"} {
			pod := must(s.CRI.RunPod(ctx, name, lab.PodOptions{}))(t)
			pods = append(pods, pod)
			for _, c := range []string{"first", "second"} {
				containers = append(containers, must(startWith(ctx, pod, c, ref,
					lab.ImageVolume("/all", id, ""), lab.ImageVolume("/part", id, "a"), lab.ImageVolume("/deep", id, "a/b")))(t))
			}
		}
		for _, c := range containers {
			for name, want := range map[string]string{"/all/two": bigContent(6), "/all/a/b/one": bigContent(5), "/part/b/one": bigContent(5), "/deep/one": bigContent(5)} {
				if got := must(c.Exec(ctx, "/guest", "cat", name))(t); got != want {
					t.Errorf("%s has other content than was pushed", name)
				}
			}
			for _, name := range []string{"/all/new", "/all/two", "/part/new", "/deep/one"} {
				if _, err := c.Exec(ctx, "/guest", "touch", name); err == nil || !strings.Contains(err.Error(), "read-only file system") {
					t.Errorf("%s is written to: %v, want that it is read-only", name, err)
				}
			}
		}
		// What containerd refuses leaves nothing, and the next container starts.
		for sub, why := range map[string]string{"two": "only directory subpath", "gone": "no such file", "out": "escapes", "../x": "escapes"} {
			if _, err := startWith(ctx, pods[0], "bad-"+sub[:1], ref, lab.ImageVolume("/v", id, sub)); err == nil || !strings.Contains(err.Error(), why) {
				t.Errorf("directory %q of the image: %v, want %q", sub, err, why)
			}
		}
		if local, size, err := s.node.Local(ctx, volume); err != nil || local > size/2 {
			t.Errorf("%d of %d bytes of the image are here (%v): this test is about those that are not", local, size, err)
		}
		noError(t, s.CRI.RemoveImage(ctx, volume))
		noError(t, pods[0].Remove(ctx))
		if got := must(containers[3].Exec(ctx, "/guest", "sum", "/all/late"))(t); got != sumOf("/all/late", late) {
			t.Error("after the image's removal, the volume has other content than was pushed")
		}
		noError(t, pods[1].Remove(ctx))
		s.removeAll(t)
	})
}

// TestImageVolumeWithUserNamespace: in a pod with a user namespace, a volume's files have
// the owners that they have in the image.
func TestImageVolumeWithUserNamespace(t *testing.T) {
	eachVolumes(t, func(t *testing.T, v lab.ContainerdVersion) {
		s := newCRISite(t, v, "", nil)
		ctx := t.Context()
		own := file("own", bigContent(1)).with(func(h *tar.Header) { h.Uid, h.Gid = 7, 8 })
		ref, volume := s.pushApp(t, "app", "x"), s.push(t, "volume", layer(t, own))
		noError(t, s.CRI.Pull(ctx, ref, nil))
		noError(t, s.CRI.Pull(ctx, volume, nil))
		for i, from := range []uint32{0, 200_000, 2_914_516_992} {
			pod := must(s.CRI.RunPod(ctx, fmt.Sprint("users", i), lab.PodOptions{HostIDs: from}))(t)
			m := lab.ImageVolume("/v", volume, "")
			if from > 0 {
				ids := []*runtimeapi.IDMapping{{HostId: from, Length: 65536}}
				m.UidMappings, m.GidMappings = ids, ids
			}
			c := must(startWith(ctx, pod, "main", ref, m))(t)
			if got := must(c.Exec(ctx, "/guest", "stat", "/v", "/v/own"))(t); got != "0:0 /v\n7:8 /v/own\n" {
				t.Errorf("with ids from %d on the container sees\n%s", from, got)
			}
			if got := must(c.Exec(ctx, "/guest", "cat", "/v/own"))(t); got != bigContent(1) {
				t.Error("the volume has other content than was pushed")
			}
			noError(t, pod.Remove(ctx))
		}
		s.removeAll(t)
	})
}

// TestImageVolumeIsNotEvicted: while a pod has an image as a volume, its bytes stay on a
// node whose cache_quota is used up, also when the image has been removed.
func TestImageVolumeIsNotEvicted(t *testing.T) {
	s := newCRISite(t, pinned(t), "cache_quota = \"128MiB\"\n", nil)
	ctx := t.Context()
	model, weights := noisy(t, "weights", 71, 48)
	big, _ := noisy(t, "f", 72, 96)
	ref, volume, other := s.pushApp(t, "app", "x"), s.push(t, "model", model), s.push(t, "other", big)
	noError(t, s.CRI.Pull(ctx, ref, nil))
	noError(t, s.CRI.Pull(ctx, volume, nil))
	pod := must(s.CRI.RunPod(ctx, "pod", lab.PodOptions{}))(t)
	c := must(startWith(ctx, pod, "main", ref, lab.ImageVolume("/v", volume, "")))(t)
	noError(t, s.node.WaitLocal(ctx, volume, time.Minute)) // as for a container's image
	noError(t, s.CRI.RemoveImage(ctx, volume))
	if _, err := s.Run(ctx, "shoal", "prefetch", "--local", "--control", s.node.Control, other); err == nil {
		t.Error("there was room for another image: this test is about a quota that is used up")
	}
	noError(t, s.registry.Stop())
	noError(t, s.supernode.Kill())
	noError(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0o200))
	if got := must(c.Exec(ctx, "/guest", "sum", "/v/weights"))(t); got != sumOf("/v/weights", weights) {
		t.Error("the volume has other content than was pushed")
	}
	noError(t, pod.Remove(ctx))
}

// Media types of artifacts.
const (
	emptyConfig = "application/vnd.oci.empty.v1+json"
	modelConfig = "application/vnd.cncf.model.config.v1+json"
	modelTar    = "application/vnd.cncf.model.weight.v1.tar"
	modelRaw    = "application/vnd.cncf.model.weight.v1.raw"
)

// artifact is what a registry has that may be no container image.
type artifact struct {
	name, artifactType, configType string
	config                         map[string]any
	blobs                          []lab.Blob
}

func (s *site) pushArtifact(t *testing.T, a artifact) (ref string) {
	t.Helper()
	config := lab.NewBlob(a.configType, must(json.Marshal(a.config))(t))
	for _, b := range append([]lab.Blob{config}, a.blobs...) {
		noError(t, s.registry.PushBlob(t.Context(), a.name, b))
	}
	man := map[string]any{"schemaVersion": 2, "mediaType": lab.MediaTypeManifest, "config": config, "layers": a.blobs}
	if a.artifactType != "" {
		man["artifactType"] = a.artifactType
	}
	must(s.registry.PushManifest(t.Context(), a.name, "v1", lab.MediaTypeManifest, must(json.Marshal(man))(t)))(t)
	return s.registry.Addr + "/" + a.name + ":v1"
}

// TestArtifactVolumes: of an artifact, what containerd unpacks is a lazy volume. Of all
// other artifacts containerd makes an empty volume without a word (and its pull brings all
// blobs into its content store); with shoal no container starts on one, and the error says
// why, as do log and status.
func TestArtifactVolumes(t *testing.T) {
	weights := func(seed int) lab.Blob {
		return lab.PlainLayer(makeTar(t, dir("m/"), file("m/weights", bigContent(seed))))
	}
	as := func(b lab.Blob, mediaType string) lab.Blob { b.MediaType = mediaType; return b }
	raw := func(seed int) lab.Blob { return lab.NewBlob(modelRaw, []byte(bigContent(seed))) }
	config := func(rootfs string, diffIDs ...string) map[string]any {
		return map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": rootfs, "diff_ids": append([]string{}, diffIDs...)}}
	}
	one, two, three, four := weights(1), weights(2), weights(3), weights(4)
	lazy := []artifact{
		{"image-of-a-type", "application/vnd.example.model.v1", lab.MediaTypeConfig, config("layers", one.DiffID), []lab.Blob{one}},
		{"no-rootfs-type", "", lab.MediaTypeConfig, config("", two.DiffID), []lab.Blob{two}},
		{"image-and-blobs", "", lab.MediaTypeConfig, config("layers", three.DiffID), []lab.Blob{raw(11), three, lab.NewBlob("text/plain", []byte("read me"))}},
	}
	refused := []artifact{
		{"model-blobs", "application/vnd.cncf.model.manifest.v1+json", modelConfig, map[string]any{"modelfs": map[string]any{"type": "layers"}}, []lab.Blob{raw(12)}},
		{"model-tar", "application/vnd.cncf.model.manifest.v1+json", modelConfig, map[string]any{"modelfs": map[string]any{"type": "layers"}}, []lab.Blob{as(four, modelTar)}},
		{"blobs", "application/vnd.example.model.v1", emptyConfig, map[string]any{}, []lab.Blob{raw(13)}},
		{"image-of-blobs", "", lab.MediaTypeConfig, config("layers"), []lab.Blob{raw(14)}},
	}
	eachVolumes(t, func(t *testing.T, v lab.ContainerdVersion) {
		s := newCRISite(t, v, "", func(s *site, o *lab.ContainerdOptions) { o.Mirror, o.MirrorCA = s.node.Mirror, s.node.MirrorCA })
		ctx := t.Context()
		pod := must(s.CRI.RunPod(ctx, "pod", lab.PodOptions{}))(t)
		app := s.pushApp(t, "app", "x")
		noError(t, s.CRI.Pull(ctx, app, nil))
		for i, a := range lazy {
			ref := s.pushArtifact(t, a)
			noError(t, s.CRI.Pull(ctx, ref, nil))
			if !s.isLazy(t, ctx, ref) {
				t.Errorf("%s is not lazy: %s", a.name, logLine(t, s.node.Log, ref))
			}
			c := must(startWith(ctx, pod, a.name, app, lab.ImageVolume("/v", ref, "m")))(t)
			if got := must(c.Exec(ctx, "/guest", "cat", "/v/weights"))(t); got != bigContent(i+1) {
				t.Errorf("%s: the volume has other content than was pushed", a.name)
			}
		}
		for _, a := range refused {
			ref := s.pushArtifact(t, a)
			noError(t, s.CRI.Pull(ctx, ref, nil))
			if _, err := startWith(ctx, pod, a.name, app, lab.ImageVolume("/v", ref, "")); err == nil || !strings.Contains(err.Error(), "the volume would be empty") {
				t.Errorf("%s: a container starts on a volume without files: %v", a.name, err)
			}
		}
		// This one containerd refuses at the pull.
		none := s.pushArtifact(t, artifact{"tar", "application/vnd.example.model.v1", emptyConfig, map[string]any{}, []lab.Blob{four}})
		if err := s.CRI.Pull(ctx, none, nil); err == nil {
			t.Error("containerd pulls an artifact whose config has no DiffIDs")
		}
		reasons := map[string]string{}
		for _, n := range must(s.node.Status(ctx))(t).NotLazy {
			reasons[n.Ref] = n.Cause + ": " + n.Why
		}
		for _, name := range []string{"model-blobs", "model-tar", "blobs", "image-of-blobs", "tar"} {
			ref := s.registry.Addr + "/" + name + ":v1"
			if why := reasons[ref]; !strings.HasPrefix(why, "unsupported: ") || !strings.Contains(why, "media type") {
				t.Errorf("status says of %s: %q", name, why)
			}
			if logLine(t, s.node.Log, ref) == "" {
				t.Errorf("the log says nothing of %s", name)
			}
		}
		noError(t, pod.Remove(ctx))
		s.removeAll(t)
	})
}
