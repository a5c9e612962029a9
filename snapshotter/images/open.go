package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

const (
	// maxLayers is what one overlayfs mount can join (OVL_MAX_STACK is 500, and
	// fix-ups need a place too).
	maxLayers = 450
	// openWorkers bounds how many indexes of an image are decoded and mounted at a
	// time, and so the memory for that.
	openWorkers = 4
)

// Want is an image that is asked for.
type Want struct {
	Ref      string // image reference
	Name     string // host/repository, with the host in lower case
	Host     string // of the registry
	Manifest blockdev.Digest
	// Layers are digests of layers that the image has; a hint that may be incomplete.
	Layers []blockdev.Digest
}

// NewWant returns what a reference asks for. The manifest may be zero.
func NewWant(ref string, manifest blockdev.Digest) (Want, error) {
	w := Want{Ref: ref, Manifest: manifest}
	spec, err := reference.Parse(ref)
	if err != nil {
		return w, fmt.Errorf("image reference %q: %w", ref, err)
	}
	host, repo, _ := strings.Cut(spec.Locator, "/")
	w.Name, w.Host = strings.ToLower(host)+"/"+repo, spec.Hostname()
	return w, nil
}

// key is that of the image's opening.
func (w Want) key() openKey {
	if w.Manifest == (blockdev.Digest{}) {
		return openKey{name: w.Name, ref: w.Ref}
	}
	return openKey{name: w.Name, manifest: w.Manifest}
}

// Opened is an image all of whose diffs have been added and mounted.
type Opened struct {
	imageRecord
	// Chains are the ChainIDs of the layers.
	Chains  []string
	private bool   // it was opened with a credential
	release func() // ends the hold on the diffs
}

// opener opens images: it gets their indexes and mounts their diffs.
type opener struct {
	cfg     *Config
	policy  *atomic.Pointer[policy.Policy]
	records *records
	refs    *refs
	groups  groups
	rights  *rights
	room    *indexRoom
}

// refused says which rule of the config keeps an image from being lazy.
type refused string

func (r refused) Error() string { return string(r) }

// open gets the indexes of the wanted image and mounts its diffs. On an error
// nothing is held, and the diffs that were added are unused.
func (op *opener) open(ctx context.Context, w Want, cred image.Credential) (_ *Opened, err error) {
	if why := op.policy.Load().NotLazy(w.Ref); why != "" {
		return nil, refused(why)
	}
	if op.cfg.Images == nil {
		return nil, fmt.Errorf("no supernode is configured: %w", blockdev.ErrUnavailable)
	}
	if why := op.local(w); why != "" {
		return nil, refused(why)
	}
	req := image.Request{Ref: w.Ref, Manifest: w.Manifest, Platform: op.cfg.Platform, Relay: true, Credential: cred}
	have, releaseHave, err := op.have(ctx, w)
	if err != nil {
		return nil, err
	}
	defer releaseHave()
	for layer := range have {
		req.Have = append(req.Have, layer)
	}

	began := time.Now()
	at := place{room: op.room}
	defer at.leave() // after add, which is the last that needs the indexes
	img, err := op.indexes(ctx, req, &at)
	if err != nil {
		return nil, err
	}
	o, err := op.check(w, img, have)
	if err != nil {
		// Images may have joined its group already.
		return nil, errors.Join(err, op.groups.unopened(img.Manifest))
	}
	if err := op.add(ctx, o, img); err != nil {
		return nil, err
	}
	o.private = cred != (image.Credential{})
	op.rights.keep(w.Name, cred)
	if op.policy.Load().Prefetch(w.Ref) != policy.None {
		op.fetchStartup(img)
	}
	op.cfg.Log.Info("image is lazy", "image", w.Ref, "manifest", o.Manifest, "layers", len(o.Layers),
		"known", len(have), "took", time.Since(began).Round(time.Millisecond))
	return o, nil
}

// indexes gets an image once there is room for its indexes. How much that takes the
// supernode says first; a request that finds no room ends, so that it holds nothing at
// the supernode while it waits, and is sent again.
func (op *opener) indexes(ctx context.Context, req image.Request, at *place) (*image.Image, error) {
	req.Admit = at.admit
	for {
		img, err := op.cfg.Images.FetchIndexes(ctx, req)
		if !errors.Is(err, errNoRoom) {
			return img, op.explain(err)
		}
		if err := at.wait(ctx); err != nil {
			return nil, err
		}
	}
}

// again is the request for an image that is on this node already.
func (op *opener) again(ctx context.Context, ref string, manifest blockdev.Digest) (image.Request, error) {
	cred, err := op.rights.source(ctx, ref)
	return image.Request{Ref: ref, Manifest: manifest, Platform: op.cfg.Platform, Credential: cred}, err
}

// explain is Credentials.Explain, if the node has credentials.
func (op *opener) explain(err error) error {
	if op.cfg.Credentials == nil {
		return err
	}
	return op.cfg.Credentials.Explain(err)
}

// have finds the wanted layers whose index is here already, and holds their diffs.
func (op *opener) have(ctx context.Context, w Want) (map[blockdev.Digest]blockdev.Digest, func(), error) {
	have, err := op.records.have(w.Host, w.Layers)
	if err != nil || len(have) == 0 {
		return nil, func() {}, err
	}
	var ids []blockdev.Digest
	for _, id := range have {
		ids = append(ids, id)
	}
	release, err := op.refs.hold(ctx, ids...)
	if err != nil {
		return nil, nil, err
	}
	// What was being removed when hold began to wait is gone now.
	have, err = op.records.have(w.Host, w.Layers)
	if err != nil {
		release()
		return nil, nil, err
	}
	for layer, id := range have {
		if !op.cfg.Data.Has(id) {
			delete(have, layer)
		}
	}
	return have, release, nil
}

// check refuses an image that is not what was asked for, or that cannot be proven
// to be it. Everything in img comes from another machine.
func (op *opener) check(w Want, img *image.Image, have map[blockdev.Digest]blockdev.Digest) (*Opened, error) {
	if n := len(img.Layers); n == 0 || n > maxLayers {
		return nil, fmt.Errorf("image has %d layers, 1 to %d can be mounted: %w", n, maxLayers, blockdev.ErrUnsupported)
	}
	o := &Opened{imageRecord: imageRecord{
		Ref: w.Ref, Host: w.Host, Manifest: img.Manifest, Opened: time.Now().UTC(), Grant: img.Grant,
	}}
	diffs := make([]digest.Digest, len(img.Layers))
	for i, l := range img.Layers {
		diffs[i] = digest.Digest(l.DiffID.String())
		o.Layers = append(o.Layers, Layer{Digest: l.Digest, DiffID: l.DiffID, Size: l.Size})
		if id, ok := have[l.Digest]; l.Index == nil && !ok {
			return nil, fmt.Errorf("layer %s came without an index: %w", l.Digest, blockdev.ErrCorrupt)
		} else if l.Index == nil && id != l.DiffID {
			return nil, fmt.Errorf("layer %s has DiffID %s, and had %s before: %w", l.Digest, l.DiffID, id, blockdev.ErrCorrupt)
		}
	}
	for _, c := range identity.ChainIDs(diffs) {
		o.Chains = append(o.Chains, c.String())
	}
	o.Top = o.Chains[len(o.Chains)-1]
	return o, nil
}

// add hands the image's indexes to the data path and mounts all of its diffs.
func (op *opener) add(ctx context.Context, o *Opened, img *image.Image) (err error) {
	// A layer can occur twice in an image.
	indexes := make(map[blockdev.Digest][]byte)
	var ids []blockdev.Digest
	for _, l := range img.Layers {
		if _, ok := indexes[l.DiffID]; !ok {
			ids = append(ids, l.DiffID)
			indexes[l.DiffID] = l.Index
		} else if indexes[l.DiffID] == nil {
			indexes[l.DiffID] = l.Index
		}
	}
	release, err := op.refs.hold(ctx, ids...)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	if err := op.records.intend(ids); err != nil {
		return err
	}
	// Now, so that other nodes that have the image are known by the time that prefetch begins.
	op.groups.join(&o.imageRecord)
	defer func() {
		if err != nil {
			err = errors.Join(err, op.groups.unopened(o.Manifest))
		}
	}()

	implied := make([][]string, len(ids))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(openWorkers)
	for i, id := range ids {
		g.Go(func() (err error) {
			if enc := indexes[id]; enc != nil {
				if implied[i], err = op.addIndex(gctx, id, enc); err != nil {
					return err
				}
			}
			// Mounting now shows what this machine cannot do while there is still an
			// ordinary way to the image.
			if _, err := op.cfg.Data.Mount(gctx, id); err != nil {
				return fmt.Errorf("mount diff %s: %w", id, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	fresh := make(map[blockdev.Digest][]string)
	for i, id := range ids {
		if indexes[id] != nil {
			fresh[id] = implied[i]
		}
	}
	if err := op.records.opened(o.imageRecord, fresh); err != nil {
		return err
	}
	o.release = release
	return nil
}

// fetchStartup has the data path fetch, from now on and not when the container
// begins to wait for it, what earlier starts of the image have read.
func (op *opener) fetchStartup(img *image.Image) {
	var profiles []blockdev.DiffProfile
	for i, l := range img.Layers {
		again := slices.ContainsFunc(img.Layers[:i], func(o image.Layer) bool { return o.DiffID == l.DiffID })
		if len(l.Profile) > 0 && !again {
			profiles = append(profiles, blockdev.DiffProfile{Diff: l.DiffID, Profile: l.Profile})
		}
	}
	if len(profiles) > 0 {
		op.cfg.Data.FetchStartup(profiles)
	}
}

// fetchAll returns when every byte of an image is here and proven. An error is that of
// layer; the rest is being fetched then.
func (op *opener) fetchAll(ctx context.Context, o *Opened) (layer blockdev.Digest, err error) {
	// All at once, so that the link is never idle at the end of a layer.
	for _, l := range o.Layers {
		op.cfg.Data.Prefetch(l.DiffID)
	}
	for _, l := range o.Layers {
		if err := op.cfg.Data.PrefetchWait(ctx, l.DiffID, nil); err != nil {
			return l.Digest, err
		}
	}
	return layer, nil
}

// addIndex adds one index that must be that of diff id, and returns its implied
// directories.
func (op *opener) addIndex(ctx context.Context, id blockdev.Digest, enc []byte) (implied []string, err error) {
	got, err := op.cfg.Data.AddChecked(ctx, enc, func(ix *blockdev.Index) error {
		if ix.DiffID != id {
			return fmt.Errorf("index of diff %s is that of %s: %w", id, ix.DiffID, blockdev.ErrCorrupt)
		}
		implied = ix.Implied
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("add diff %s: %w", id, err)
	}
	if got != id {
		return nil, fmt.Errorf("data path took diff %s for %s: %w", id, got, blockdev.ErrCorrupt)
	}
	return implied, nil
}

// local says why an image cannot be asked of a supernode on another machine.
func (op *opener) local(w Want) string {
	if op.cfg.Remote && policy.LocalHost(w.Host) {
		return fmt.Sprintf("%s is a name that only this machine knows, and the supernode runs on another machine", w.Host)
	}
	return ""
}

// answered says whether an error is the answer of a supernode, or of the registry
// that it has asked: then the error says what is wrong there.
func answered(err error) bool {
	var a interface{ Answered() bool }
	return errors.As(err, &a) && a.Answered()
}

// cause makes an error of opening an image into the words of a log line.
func cause(err error, timeout time.Duration) string {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("its indexes did not come within %v: %v", timeout, err)
	case errors.Is(err, blockdev.ErrUnavailable) && answered(err):
		return fmt.Sprintf("it is not available now: %v", err)
	case errors.Is(err, blockdev.ErrUnavailable):
		return fmt.Sprintf("no supernode answers: %v", err)
	case errors.Is(err, blockdev.ErrUnauthorized):
		return fmt.Sprintf("no credential that was shown opens it: %v", err)
	default:
		return err.Error()
	}
}
