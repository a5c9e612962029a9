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
	// Kept: KeepImage holds at least one of its diffs, which no snapshot uses.
	Kept bool `json:"kept"`
}

func (r *imageRecord) anyKept(kept map[blockdev.Digest]bool) bool {
	return slices.ContainsFunc(r.Layers, func(l Layer) bool { return kept[l.DiffID] })
}

// Images lists the images that are lazy on this node or kept, sorted by reference.
func (s *Snapshotter) Images(ctx context.Context) ([]Image, error) {
	chains := make(map[string]struct{})
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			if _, lazy := info.Labels[labelDiff]; lazy {
				chains[info.Labels[labelRef]] = struct{}{}
			}
			return nil
		})
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	records, err := s.records.images()
	if err != nil {
		return nil, err
	}
	kept, err := s.records.diffs()
	if err != nil {
		return nil, err
	}
	var list []Image
	for _, rec := range records {
		img := Image{Ref: rec.Ref, Manifest: rec.Manifest, Layers: rec.Layers, Kept: rec.anyKept(kept)}
		if _, ok := chains[rec.Top]; ok || img.Kept {
			list = append(list, img)
		}
	}
	slices.SortFunc(list, func(a, b Image) int {
		return strings.Compare(a.Ref+" "+a.Manifest.Hex(), b.Ref+" "+b.Manifest.Hex())
	})
	return list, nil
}

// KeepImage opens an image that containerd has not asked for, so that it can be
// prefetched: it adds and mounts all of its diffs and keeps those that no snapshot
// uses, until a snapshot does or Release is called, also across restarts. A zero
// manifest is what ref names now. Errors are those of blockdev.ImageSource.
func (s *Snapshotter) KeepImage(ctx context.Context, ref string, manifest blockdev.Digest) (Image, error) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return Image{}, fmt.Errorf("image reference %q: %w", ref, err)
	}
	o, err := s.open(ctx, want{ref: ref, host: spec.Hostname(), manifest: manifest})
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", ref, err)
	}
	defer o.release()
	img := Image{Ref: ref, Manifest: o.Manifest, Layers: o.Layers}
	kept := make(map[blockdev.Digest]bool)
	for _, l := range o.Layers {
		kept[l.DiffID] = s.refs.setKept(l.DiffID, true)
		img.Kept = img.Kept || kept[l.DiffID]
	}
	if err := s.records.setKept(kept); err != nil {
		return Image{}, fmt.Errorf("image %s: %w", ref, err)
	}
	return img, nil
}

// Release ends the keeping of diffs. Those that nobody uses are removed.
func (s *Snapshotter) Release(ctx context.Context, ids ...blockdev.Digest) error {
	kept := make(map[blockdev.Digest]bool)
	for _, id := range ids {
		s.refs.setKept(id, false)
		kept[id] = false
	}
	if err := s.records.setKept(kept); err != nil {
		return err
	}
	s.sweep(ctx)
	return nil
}
