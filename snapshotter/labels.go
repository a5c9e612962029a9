package snapshotter

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/images"
)

const (
	// labelRef is containerd's: the ChainID that the layer being prepared will
	// have. containerd leaves it as it is; keys and parents it rewrites to
	// "<namespace>/<number>/<key>".
	labelRef = "containerd.io/snapshot.ref"

	// LabelPrefetch, with the value PrefetchWait, makes the pull wait until every
	// byte of the image is local and verified, but not longer than
	// Config.PrepareTimeout.
	LabelPrefetch = "containerd.io/snapshot/shoal.prefetch"
	// PrefetchWait is LabelPrefetch's only value.
	PrefetchWait = "wait"

	// labelDiff names a lazy snapshot's DiffID, and labelFixup says that the
	// snapshot has fix-ups. Both are set by the snapshotter alone: a layer's
	// annotations in a hostile manifest become labels, too.
	labelDiff  = "containerd.io/snapshot/shoal.diff"
	labelFixup = "containerd.io/snapshot/shoal.fixup"
)

// callersInfo is what opts say, without the labels that are the snapshotter's.
func callersInfo(opts []snapshots.Opt) (snapshots.Info, error) {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return info, err
		}
	}
	if _, diff := info.Labels[labelDiff]; !diff && info.Labels[labelFixup] == "" {
		return info, nil
	}
	info.Labels = maps.Clone(info.Labels)
	delete(info.Labels, labelDiff)
	delete(info.Labels, labelFixup)
	return info, nil
}

// guard makes an Update leave alone what makes a snapshot lazy or not: labels that
// are the snapshotter's, and the ChainID of a lazy snapshot.
func guard(info, old snapshots.Info, fieldpaths []string) (snapshots.Info, []string) {
	keys := []string{labelDiff, labelFixup}
	if _, lazy := old.Labels[labelDiff]; lazy {
		keys = append(keys, labelRef)
	}
	labels := maps.Clone(info.Labels)
	for _, k := range keys {
		if v, ok := old.Labels[k]; ok {
			if labels == nil {
				labels = make(map[string]string)
			}
			labels[k] = v
		} else {
			delete(labels, k)
		}
	}
	info.Labels = labels
	kept := fieldpaths[:0:0]
	for _, p := range fieldpaths {
		if k, ok := strings.CutPrefix(p, "labels."); ok && slices.Contains(keys, k) {
			// As it is. An absent one must not be written as empty.
			if _, ok := labels[k]; !ok {
				continue
			}
		}
		kept = append(kept, p)
	}
	return info, kept
}

// unpacks reports whether a snapshot that is not committed is for the unpacking of a layer.
func unpacks(info snapshots.Info) bool {
	_, ok := info.Labels[labelRef]
	return ok
}

// parseWant reads the labels that pkg/snapshotters of containerd sets.
func parseWant(labels map[string]string) (images.Want, error) {
	ref := labels[snapshotters.TargetRefLabel]
	if ref == "" {
		return images.Want{}, fmt.Errorf("containerd has not said which image the layer belongs to: label %s is missing "+
			"(exports.enable_remote_snapshot_annotations and CRI's disable_snapshot_annotations decide about it)",
			snapshotters.TargetRefLabel)
	}
	w, err := images.NewWant(ref, blockdev.Digest{})
	if err != nil {
		return w, err
	}
	if v := labels[snapshotters.TargetManifestDigestLabel]; v != "" {
		if w.Manifest, err = blockdev.ParseDigest(v); err != nil {
			return w, fmt.Errorf("manifest: %w", err)
		}
	}
	for _, key := range []string{snapshotters.TargetLayerDigestLabel, snapshotters.TargetImageLayersLabel} {
		for v := range strings.SplitSeq(labels[key], ",") {
			if v == "" {
				continue
			}
			d, err := blockdev.ParseDigest(v)
			if err != nil {
				return w, fmt.Errorf("layer: %w", err)
			}
			w.Layers = append(w.Layers, d) // labels have a maximal length
		}
	}
	return w, nil
}

// namespaceOf is containerd's namespace in a key; empty for a caller that is not
// containerd's metadata store.
func namespaceOf(key string) string {
	if ns, _, ok := strings.Cut(key, "/"); ok {
		return ns
	}
	return ""
}

// diffOf is the DiffID of a lazy snapshot.
func diffOf(info snapshots.Info) (blockdev.Digest, bool, error) {
	v, ok := info.Labels[labelDiff]
	if !ok || info.Kind != snapshots.KindCommitted {
		return blockdev.Digest{}, false, nil
	}
	d, err := blockdev.ParseDigest(v)
	if err != nil {
		return blockdev.Digest{}, false, fmt.Errorf("snapshot %q: %w", info.Name, err)
	}
	return d, true, nil
}
