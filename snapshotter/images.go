package snapshotter

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// Layer is one layer of an image on this node.
type Layer struct {
	// Digest and Size (bytes) are those of the compressed blob.
	Digest blockdev.Digest `json:"digest"`
	Size   int64           `json:"size"`
	DiffID blockdev.Digest `json:"diffID"`
}

// Image is an image that is lazy on this node, or kept.
type Image struct {
	// Ref is the reference it was opened by. An image that got another name since,
	// without a pull, is still listed under this one.
	Ref      string          `json:"ref"`
	Manifest blockdev.Digest `json:"manifest"`
	// Layers from the bottom up.
	Layers []Layer `json:"layers"`
	// Kept: KeepImage holds it, and it has not been pulled since.
	Kept bool `json:"kept"`
}

// Images lists the images that are lazy on this node or kept, sorted by reference.
func (s *Snapshotter) Images(ctx context.Context) ([]Image, error) {
	chains, err := s.lazyChains(ctx)
	if err != nil {
		return nil, err
	}
	records, err := s.records.images()
	if err != nil {
		return nil, err
	}
	var list []Image
	for _, rec := range records {
		img := Image{Ref: rec.Ref, Manifest: rec.Manifest, Layers: rec.Layers, Kept: rec.Kept}
		if _, ok := chains[rec.Top]; ok || img.Kept {
			list = append(list, img)
		}
	}
	slices.SortFunc(list, func(a, b Image) int {
		return strings.Compare(a.Ref+" "+a.Manifest.Hex(), b.Ref+" "+b.Manifest.Hex())
	})
	return list, nil
}

// lazyChains are the ChainIDs of all lazy snapshots.
func (s *Snapshotter) lazyChains(ctx context.Context) (map[string]struct{}, error) {
	chains := make(map[string]struct{})
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return walkChains(ctx, chains)
	})
	return chains, err
}

// walkChains needs a transaction.
func walkChains(ctx context.Context, chains map[string]struct{}) error {
	err := storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
		if _, lazy := info.Labels[labelDiff]; lazy {
			chains[info.Labels[labelRef]] = struct{}{}
		}
		return nil
	})
	if errdefs.IsNotFound(err) { // never had a snapshot
		return nil
	}
	return err
}

// KeepImage opens an image that containerd has not asked for, so that it can be
// prefetched: it adds and mounts all of its diffs, and keeps them until the image
// has been pulled, or is released, also across restarts. An image that is on this
// node as a lazy one already is not kept: its snapshots do that. A zero manifest is
// what ref names now. Errors are those of image.Source.
func (s *Snapshotter) KeepImage(ctx context.Context, ref string, manifest blockdev.Digest) (Image, error) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return Image{}, fmt.Errorf("image reference %q: %w", ref, err)
	}
	var cred image.Credential
	if s.cfg.Credentials != nil {
		if cred, err = s.cfg.Credentials.Credential(ctx, ref); err != nil {
			return Image{}, fmt.Errorf("credential for %s: %w", spec.Hostname(), err)
		}
	}
	o, err := s.open(ctx, want{ref: ref, name: nameOf(spec), host: spec.Hostname(), manifest: manifest}, cred)
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", ref, err)
	}
	defer o.release()
	img := Image{Ref: ref, Manifest: o.Manifest, Layers: o.Layers}
	chains, err := s.lazyChains(ctx)
	if err != nil {
		return Image{}, err
	}
	if _, ok := chains[o.Top]; ok {
		return img, nil
	}
	changed, err := s.records.keep(&o.imageRecord)
	if err != nil {
		return Image{}, err
	}
	if changed {
		s.refs.keep(o.diffs(), 1)
	}
	img.Kept = true
	return img, nil
}

// ReleaseImage ends the keeping of an image. Unused diffs are removed.
func (s *Snapshotter) ReleaseImage(ctx context.Context, manifest blockdev.Digest) error {
	if err := s.release(manifest); err != nil {
		return err
	}
	s.sweep(ctx)
	return nil
}

// PinImage keeps a kept image from being evicted until release is called.
func (s *Snapshotter) PinImage(ctx context.Context, img Image) (release func(), err error) {
	rec := imageRecord{Layers: img.Layers}
	return s.refs.hold(ctx, rec.diffs()...)
}

// Evict frees room on the data path: unused diffs, or else the kept image
// that was opened longest ago and has diffs that no other image uses. It reports
// whether there was any. What a snapshot uses is never evicted.
func (s *Snapshotter) Evict(ctx context.Context) bool {
	if s.sweep(ctx) > 0 {
		return true
	}
	list, err := s.records.images()
	if err != nil {
		s.log.Error("cannot find images to evict", "error", err)
		return false
	}
	slices.SortFunc(list, func(a, b imageRecord) int { return a.Opened.Compare(b.Opened) })
	for _, img := range list {
		if !img.Kept || !s.refs.onlyKept(img.diffs()) {
			continue
		}
		if err := s.release(img.Manifest); err != nil {
			s.log.Error("cannot evict an image", "image", img.Ref, "error", err)
			continue
		}
		s.log.Info("evicted an image that was prefetched and not pulled, to make room", "image", img.Ref, "opened", img.Opened)
		if s.sweep(ctx) > 0 {
			return true
		}
	}
	return false
}

func (s *Snapshotter) release(manifest blockdev.Digest) error {
	released, err := s.records.release(manifest)
	for _, img := range released {
		s.refs.keep(img.diffs(), -1)
	}
	return err
}
