package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/image"
)

// layer is a layer's tar and what a supernode would make of it.
type layer struct {
	tar     []byte
	digest  blockdev.Digest
	diffID  blockdev.Digest
	implied []string
	index   []byte
}

// file is a regular file with its path as content, dir a directory; both with
// further changes to the header.
func file(name string, change ...func(*tar.Header)) *tar.Header {
	h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(name))}
	for _, c := range change {
		c(h)
	}
	return h
}

func dir(name string, mode int64, change ...func(*tar.Header)) *tar.Header {
	h := &tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: mode}
	for _, c := range change {
		c(h)
	}
	return h
}

// newLayer makes a layer of entries.
func newLayer(t testing.TB, entries ...*tar.Header) layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	there := map[string]bool{".": true}
	for _, h := range entries {
		check(t, w.WriteHeader(h))
		if h.Typeflag == tar.TypeReg {
			must(w.Write([]byte(h.Name)[:h.Size]))(t)
		}
		if h.Typeflag == tar.TypeDir {
			there[path.Clean(h.Name)] = true
		}
	}
	check(t, w.Close())
	l := layer{tar: b.Bytes(), diffID: blockdev.Sum(b.Bytes()), digest: blockdev.Sum(append([]byte("gz"), b.Bytes()...))}
	for _, h := range entries {
		for p := path.Dir(path.Clean(h.Name)); !there[p]; p = path.Dir(p) {
			there[p] = true
			l.implied = append(l.implied, p)
		}
	}
	slices.Sort(l.implied)
	ix := &blockdev.Index{DiffID: l.diffID, DiffSize: int64(b.Len()), Meta: l.tar, Implied: l.implied}
	for off := 0; off < b.Len(); off += blockdev.MaxChunk {
		n := min(blockdev.MaxChunk, b.Len()-off)
		ix.Chunks = append(ix.Chunks, blockdev.Chunk{Offset: int64(off), Length: uint32(n), Digest: blockdev.Sum(b.Bytes()[off : off+n])})
	}
	l.index = must(index.Encode(ix))(t)
	return l
}

// testImage is a reference and its layers from the bottom up.
type testImage struct {
	ref      string
	manifest blockdev.Digest
	layers   []layer
}

func newImage(ref string, layers ...layer) testImage {
	h := sha256.New()
	h.Write([]byte(ref))
	for _, l := range layers {
		h.Write(l.digest[:])
	}
	return testImage{ref: ref, manifest: blockdev.Digest(h.Sum(nil)), layers: layers}
}

func (i testImage) chain(n int) string {
	var ids []digest.Digest
	for _, l := range i.layers[:n+1] {
		ids = append(ids, digest.Digest(l.diffID.String()))
	}
	return identity.ChainID(ids).String()
}

// labels are those that containerd gives with layer n.
func (i testImage) labels(n int) map[string]string {
	var list []string
	for _, l := range i.layers[n:] {
		list = append(list, l.digest.String())
	}
	return map[string]string{
		labelRef:                               i.chain(n),
		snapshotters.TargetRefLabel:            i.ref,
		snapshotters.TargetManifestDigestLabel: i.manifest.String(),
		snapshotters.TargetLayerDigestLabel:    i.layers[n].digest.String(),
		snapshotters.TargetImageLayersLabel:    strings.Join(list, ","),
	}
}

// pull does what containerd's unpacker does. It returns the name of the top
// snapshot and which layers had to be fetched.
func (n *node) pull(ctx context.Context, i testImage, extra ...string) (top string, fetched []int, err error) {
	for k := range i.layers {
		labels := i.labels(k)
		for _, e := range extra {
			key, value, _ := strings.Cut(e, "=")
			labels[key] = value
		}
		opt := snapshots.WithLabels(labels)
		name := "ns/1/" + i.chain(k)
		key := fmt.Sprintf("ns/2/extract-%d %s", k, i.chain(k))
		if _, err := n.Stat(ctx, name); err == nil {
			top = name
			continue
		}
		mounts, err := n.Prepare(ctx, key, top, opt)
		if errdefs.IsAlreadyExists(err) {
			found := ""
			filter := fmt.Sprintf(`labels."containerd.io/snapshot.ref"==%s,parent==%q`, i.chain(k), top)
			werr := n.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
				if info.Kind == snapshots.KindCommitted {
					found = info.Name
				}
				return nil
			}, filter)
			if werr != nil || found == "" {
				return top, fetched, fmt.Errorf("layer %d answered AlreadyExists, and is not there: %w", k, errors.Join(werr, err))
			}
			top = found
			continue
		}
		if err != nil {
			return top, fetched, err
		}
		fetched = append(fetched, k)
		if err := applyTar(ctx, mounts, i.layers[k].tar); err != nil {
			return top, fetched, err
		}
		if err := n.Commit(ctx, name, key, opt); err != nil {
			return top, fetched, err
		}
		top = name
	}
	return top, fetched, nil
}

// fakeData is a data path of directories. Prefetch brings nothing, as if all sources
// were away, unless fetches is set.
type fakeData struct {
	t    testing.TB
	root string

	mu         sync.Mutex
	added      map[blockdev.Digest]int // times
	dirs       map[blockdev.Digest]string
	implied    map[blockdev.Digest][]string
	complete   map[blockdev.Digest]bool
	fetches    bool
	removed    []blockdev.Digest
	prefetched []blockdev.Digest
	stopped    []blockdev.Digest
	waited     []blockdev.Digest
	startup    []blockdev.DiffProfile
	mountErr   map[blockdev.Digest]error
	addErr     error
	removeErr  error
	waitErr    error
	onRemove   func(blockdev.Digest)
}

// forgetPrefetched empties the list of what has been prefetched, and returns its length.
func (d *fakeData) forgetPrefetched() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.prefetched)
	d.prefetched = nil
	return n
}

func newFakeData(t testing.TB, root string) *fakeData {
	check(t, os.MkdirAll(root, 0o755))
	return &fakeData{
		t: t, root: root,
		added: make(map[blockdev.Digest]int), dirs: make(map[blockdev.Digest]string), mountErr: make(map[blockdev.Digest]error),
		implied: make(map[blockdev.Digest][]string), complete: make(map[blockdev.Digest]bool),
	}
}

func (d *fakeData) AddChecked(ctx context.Context, enc []byte, check func(*blockdev.Index) error) (blockdev.Digest, error) {
	ix, err := index.Decode(enc)
	if err != nil {
		return blockdev.Digest{}, err
	}
	if err := check(ix); err != nil {
		return blockdev.Digest{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.addErr != nil {
		return ix.DiffID, d.addErr
	}
	d.added[ix.DiffID]++
	if d.dirs[ix.DiffID] != "" {
		return ix.DiffID, nil
	}
	dir := filepath.Join(d.root, ix.DiffID.Hex()[:12])
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return ix.DiffID, err
	}
	_, err = archive.Apply(ctx, dir, bytes.NewReader(ix.Meta), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	d.dirs[ix.DiffID], d.implied[ix.DiffID] = dir, ix.Implied
	return ix.DiffID, err
}

func (d *fakeData) Mount(_ context.Context, id blockdev.Digest) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.mountErr[id]; err != nil {
		return "", err
	}
	dir, ok := d.dirs[id]
	if !ok {
		return "", fmt.Errorf("diff %s: %w", id, blockdev.ErrNotFound)
	}
	return dir, nil
}

func (d *fakeData) Remove(_ context.Context, id blockdev.Digest) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.onRemove != nil {
		d.onRemove(id)
	}
	if d.removeErr != nil {
		return d.removeErr
	}
	d.removed = append(d.removed, id)
	dir := d.dirs[id]
	delete(d.dirs, id)
	delete(d.complete, id)
	if dir == "" {
		return nil
	}
	return os.RemoveAll(dir)
}

func (d *fakeData) ContainerStarts(...blockdev.Digest) {}

func (d *fakeData) StopPrefetch(ids ...blockdev.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopped = append(d.stopped, ids...)
}

func (d *fakeData) Has(id blockdev.Digest) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dirs[id] != ""
}

func (d *fakeData) Incomplete(id blockdev.Digest) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dirs[id] != "" && !d.complete[id]
}

func (d *fakeData) Prefetch(ids ...blockdev.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.prefetched = append(d.prefetched, ids...)
	for _, id := range ids {
		d.complete[id] = d.fetches && d.dirs[id] != ""
	}
}

func (d *fakeData) Implied(id blockdev.Digest) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dirs[id] == "" {
		return nil, fmt.Errorf("diff %s: %w", id, blockdev.ErrNotFound)
	}
	return d.implied[id], nil
}

func (d *fakeData) FetchStartup(profiles []blockdev.DiffProfile) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range profiles {
		if d.dirs[p.Diff] == "" {
			d.t.Errorf("startup profile of diff %s before it was added", p.Diff)
		}
	}
	d.startup = append(d.startup, profiles...)
}

func (d *fakeData) PrefetchWait(_ context.Context, id blockdev.Digest, progress func(local, total int64)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waited = append(d.waited, id)
	switch {
	case d.dirs[id] == "":
		return fmt.Errorf("diff %s: %w", id, blockdev.ErrNotFound)
	case d.waitErr != nil:
		return d.waitErr
	}
	d.complete[id] = true
	if progress != nil {
		progress(1, 1)
	}
	return nil
}

func (d *fakeData) FullUse(id blockdev.Digest) (bytes, inodes int64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dirs[id] == "" {
		return 0, 0, fmt.Errorf("diff %s: %w", id, blockdev.ErrNotFound)
	}
	return 4711, 7, nil
}

func (d *fakeData) Diffs() (ids []blockdev.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id := range d.dirs {
		ids = append(ids, id)
	}
	return ids
}

func (d *fakeData) has(l layer) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dirs[l.diffID] != ""
}

func (d *fakeData) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

// fakeImages is a supernode.
type fakeImages struct {
	mu       sync.Mutex
	images   map[blockdev.Digest]testImage
	requests []image.Request
	err      error
	// gate, if not nil, is waited for.
	gate chan struct{}
	// want, if not nil, is the only credential that opens anything.
	want *image.Credential
	// entered, if not nil, gets a value when a request begins.
	entered chan struct{}
	change  func(*image.Image)
}

func newFakeImages() *fakeImages { return &fakeImages{images: make(map[blockdev.Digest]testImage)} }

func (f *fakeImages) publish(list ...testImage) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, i := range list {
		f.images[i.manifest] = i
	}
}

func (f *fakeImages) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	f.mu.Lock()
	f.requests = append(f.requests, req)
	gate, err, change, want := f.gate, f.err, f.change, f.want
	if f.entered != nil {
		select {
		case f.entered <- struct{}{}:
		default:
		}
	}
	i, ok := f.images[req.Manifest]
	if req.Manifest == (blockdev.Digest{}) {
		for _, i = range f.images {
			if ok = i.ref == req.Ref; ok {
				break
			}
		}
	}
	f.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err == nil && want != nil && req.Credential != *want {
		err = blockdev.ErrUnauthorized
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", req.Ref, err)
	}
	if !ok {
		return nil, fmt.Errorf("image %s: %w", req.Ref, blockdev.ErrNotFound)
	}
	img := &image.Image{Ref: req.Ref, Manifest: i.manifest}
	for _, l := range i.layers {
		out := image.Layer{Digest: l.digest, Size: int64(len(l.tar)), DiffID: l.diffID, Index: l.index}
		if slices.Contains(req.Have, l.digest) {
			out.Index = nil
		}
		img.Layers = append(img.Layers, out)
	}
	if change != nil {
		change(img)
	}
	if req.Admit != nil {
		var total int64
		for _, l := range img.Layers {
			total += int64(len(l.Index))
		}
		if err := req.Admit(total); err != nil {
			return nil, fmt.Errorf("image %s: %w", req.Ref, err)
		}
	}
	return img, nil
}

func (f *fakeImages) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeImages) asked() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.requests)
}
