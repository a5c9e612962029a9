package integration

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// weights is a file of a model: noise, of which no two pages are the same. It takes
// neither memory nor disk.
type weights struct {
	base []byte // of all pages
	size int64
}

const weightsPage = 64 << 10

func newWeights(size int64) *weights {
	return &weights{base: []byte(content(99, 1<<20)), size: size}
}

// ReadAt implements io.ReaderAt.
func (w *weights) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) && off < w.size {
		page, at := off/weightsPage, off%weightsPage
		from := page * weightsPage % int64(len(w.base))
		k := min(int64(len(p)-n), weightsPage-at, w.size-off)
		copy(p[n:], w.base[from+at:from+at+k])
		var number [8]byte // at the beginning of each page
		binary.LittleEndian.PutUint64(number[:], uint64(page))
		if at < 8 {
			copy(p[n:n+int(k)], number[at:])
		}
		n, off = n+int(k), off+k
	}
	if n < len(p) {
		err = io.EOF
	}
	return n, err
}

// weightsTar is a tar: what stands before the file's content, the content, and the end.
type weightsTar struct {
	head, tail []byte
	content    *weights
}

func (j *weightsTar) size() int64 { return int64(len(j.head)) + j.content.size + int64(len(j.tail)) }

// ReadAt implements io.ReaderAt.
func (j *weightsTar) ReadAt(p []byte, off int64) (n int, err error) {
	for _, part := range []struct {
		r    io.ReaderAt
		size int64
	}{{bytes.NewReader(j.head), int64(len(j.head))}, {j.content, j.content.size}, {bytes.NewReader(j.tail), int64(len(j.tail))}} {
		if off < part.size && n < len(p) {
			k, err := part.r.ReadAt(p[n:n+int(min(int64(len(p)-n), part.size-off))], off)
			if err != nil && err != io.EOF {
				return n, err
			}
			n, off = n+k, off+int64(k)
		}
		off -= part.size
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// serveModel is a registry with one image, model:v1, of one layer with the file weights. It
// returns the image's reference.
func serveModel(t *testing.T, w *weights) (ref string) {
	t.Helper()
	var head bytes.Buffer
	noError(t, tar.NewWriter(&head).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "weights", Mode: 0o644, Size: w.size, ModTime: mtime}))
	layer := &weightsTar{head: head.Bytes(), content: w, tail: make([]byte, (512-w.size%512)%512+1024)}
	h := sha256.New()
	must(io.CopyBuffer(h, io.NewSectionReader(layer, 0, layer.size()), make([]byte, 1<<20)))(t)
	digest := fmt.Sprintf("sha256:%x", h.Sum(nil))
	config := lab.NewBlob(lab.MediaTypeConfig, must(json.Marshal(map[string]any{
		"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest}},
	}))(t))
	manifest := lab.NewBlob(lab.MediaTypeManifest, must(json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": lab.MediaTypeManifest, "artifactType": "application/vnd.example.model.v1", "config": config,
		"layers": []lab.Blob{{MediaType: lab.MediaTypeLayer, Digest: digest, Size: layer.size()}},
	}))(t))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2/{$}", func(http.ResponseWriter, *http.Request) {})
	serve := func(path, mediaType, digest string, r io.ReaderAt, size int64) {
		mux.HandleFunc("GET /v2/model/"+path, func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Content-Type", mediaType)
			w.Header().Set("Docker-Content-Digest", digest)
			http.ServeContent(w, req, "", time.Time{}, io.NewSectionReader(r, 0, size))
		})
	}
	for _, name := range []string{"v1", manifest.Digest} {
		serve("manifests/"+name, manifest.MediaType, manifest.Digest, bytes.NewReader(manifest.Data), manifest.Size)
	}
	serve("blobs/"+config.Digest, config.MediaType, config.Digest, bytes.NewReader(config.Data), config.Size)
	serve("blobs/"+digest, "application/octet-stream", digest, layer, layer.size())
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/model:v1"
}

// TestDrillModel: a model in one layer, a file of 5 GiB (in make test, of 1), is a pod's
// volume at once. Reads at random places fetch little more than what they read, and
// neither node nor supernode takes much memory for it.
func TestDrillModel(t *testing.T) {
	size := int64(1<<30 + 12345)
	if isDrill() {
		size = 5<<30 + 12345 // more than 32 bits can say
	}
	s := newPullSite(t, "prefetch = \"none\"\n")
	ctx := t.Context()
	w := newWeights(size)
	ref := serveModel(t, w)
	began := time.Now()
	must(s.Run(ctx, "shoal", "prefetch", "--control", s.supernode.Control, ref))(t)
	ingest := time.Since(began)
	app := s.pushApp(t, "app", "x")
	noError(t, s.CRI.Pull(ctx, app, nil))
	pod := must(s.CRI.RunPod(ctx, "pod", lab.PodOptions{}))(t)
	began = time.Now()
	noError(t, s.CRI.Pull(ctx, ref, nil))
	must(startWith(ctx, pod, "main", app, lab.ImageVolume("/v", ref, "")))(t)
	start := time.Since(began)
	if !s.isLazy(t, ctx, ref) {
		t.Fatalf("the model is not lazy: %s", logLine(t, s.node.Log, ref))
	}
	file := ""
	for _, m := range must(s.Mounts())(t) {
		if strings.Contains(m, "/image-volumes/") {
			file = filepath.Join(m, "weights")
		}
	}
	f := must(os.Open(file))(t)
	defer f.Close()
	if fi := must(f.Stat())(t); fi.Size() != size {
		t.Fatalf("the file has %d bytes, want %d", fi.Size(), size)
	}
	const reads, length = 200, 10_000
	got, want := make([]byte, length), make([]byte, length)
	rng := rand.New(rand.NewPCG(1, 2))
	wrong := 0
	for i := range reads {
		off := rng.Int64N(size - length)
		switch i {
		case 0:
			off = 0
		case 1:
			off = size - length
		}
		must(w.ReadAt(want, off))(t)
		must(f.ReadAt(got, off))(t)
		if !bytes.Equal(got, want) {
			wrong++
		}
	}
	d := fmt.Sprintf("model of %d GiB in one layer", size>>30)
	count(t, d+": reads with wrong bytes", wrong)
	local, _, err := s.node.Local(ctx, ref)
	noError(t, err)
	if local > size/4 {
		t.Errorf("%d reads of %d bytes have fetched %d of %d bytes", reads, length, local, size)
	}
	index := int64(0)
	for _, p := range must(filepath.Glob(s.node.Root + "/diffs/*/index"))(t) {
		index = max(index, must(os.Stat(p))(t).Size())
	}
	_, node, err := s.node.RSS()
	noError(t, err)
	_, super, err := s.supernode.RSS()
	noError(t, err)
	const mib = 1 << 20
	figure(t, d+": ingest", "s", "", 0, ingest.Seconds())
	figure(t, d+": pull, and start of a container that has it as a volume", "s", "", 0, start.Seconds())
	figure(t, fmt.Sprintf("%s: fetched for %d reads of %d bytes", d, reads, length), "MiB", "", 0, float64(local)/mib)
	figure(t, d+": index, for each GiB", "MiB", report.AtMost, 1, float64(index)/mib/(float64(size)/(1<<30)))
	figure(t, d+": peak RSS of the node", "MiB", report.AtMost, 200, float64(node)/mib)
	figure(t, d+": peak RSS of the supernode", "MiB", report.AtMost, 300, float64(super)/mib)
	t.Logf("ingest %v, start %v, index %d, local %d, RSS node %d MiB, supernode %d MiB", ingest, start, index, local, node/mib, super/mib)
	noError(t, f.Close())
	noError(t, pod.Remove(ctx))
}
