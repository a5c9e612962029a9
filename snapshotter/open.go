package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

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

// openImage is an image all of whose diffs have been added and mounted.
type openImage struct {
	imageRecord
	chains  []string // ChainID of each layer
	private bool     // it was opened with a credential
	release func()   // ends the hold on the diffs
}

// position of the layer with this ChainID; -1: there is none.
func (o *openImage) position(chain string) int { return slices.Index(o.chains, chain) }

// refused says which rule of the config keeps an image from being lazy.
type refused string

func (r refused) Error() string { return string(r) }

// open gets the indexes of the wanted image and mounts its diffs. On an error
// nothing is held, and the diffs that were added are unused.
func (s *Snapshotter) open(ctx context.Context, w want, cred image.Credential) (_ *openImage, err error) {
	if why := s.policy.Load().NotLazy(w.ref); why != "" {
		return nil, refused(why)
	}
	if s.cfg.Images == nil {
		return nil, fmt.Errorf("no supernode is configured: %w", blockdev.ErrUnavailable)
	}
	if why := s.local(w); why != "" {
		return nil, refused(why)
	}
	req := image.Request{Ref: w.ref, Manifest: w.manifest, Platform: s.cfg.Platform, Relay: true, Credential: cred}
	have, releaseHave, err := s.have(ctx, w)
	if err != nil {
		return nil, err
	}
	defer releaseHave()
	for layer := range have {
		req.Have = append(req.Have, layer)
	}

	began := time.Now()
	at := place{room: s.room}
	defer at.leave() // after add, which is the last that needs the indexes
	img, err := s.indexes(ctx, req, &at)
	if err != nil {
		return nil, err
	}
	o, err := s.check(w, img, have)
	if err != nil {
		// Images may have joined its group already.
		return nil, errors.Join(err, s.leaveUnopened(img.Manifest))
	}
	if err := s.add(ctx, o, img); err != nil {
		return nil, err
	}
	o.private = cred != (image.Credential{})
	s.rights.keep(w.name, cred)
	if s.policy.Load().Prefetch(w.ref) != policy.None {
		s.fetchStartup(img)
	}
	s.log.Info("image is lazy", "image", w.ref, "manifest", o.Manifest, "layers", len(o.Layers),
		"known", len(have), "took", time.Since(began).Round(time.Millisecond))
	return o, nil
}

// indexes gets an image once there is room for its indexes. How much that takes the
// supernode says first; a request that finds no room ends, so that it holds nothing at
// the supernode while it waits, and is sent again.
func (s *Snapshotter) indexes(ctx context.Context, req image.Request, at *place) (*image.Image, error) {
	req.Admit = at.admit
	for {
		img, err := s.cfg.Images.FetchIndexes(ctx, req)
		if !errors.Is(err, errNoRoom) {
			return img, err
		}
		if err := at.wait(ctx); err != nil {
			return nil, err
		}
	}
}

// have finds the wanted layers whose index is here already, and holds their diffs.
func (s *Snapshotter) have(ctx context.Context, w want) (map[blockdev.Digest]blockdev.Digest, func(), error) {
	have, err := s.records.have(w.host, w.layers)
	if err != nil || len(have) == 0 {
		return nil, func() {}, err
	}
	var ids []blockdev.Digest
	for _, id := range have {
		ids = append(ids, id)
	}
	release, err := s.refs.hold(ctx, ids...)
	if err != nil {
		return nil, nil, err
	}
	// What was being removed when hold began to wait is gone now.
	have, err = s.records.have(w.host, w.layers)
	if err != nil {
		release()
		return nil, nil, err
	}
	for layer, id := range have {
		if !s.cfg.Data.Has(id) {
			delete(have, layer)
		}
	}
	return have, release, nil
}

// check refuses an image that is not what was asked for, or that cannot be proven
// to be it. Everything in img comes from another machine.
func (s *Snapshotter) check(w want, img *image.Image, have map[blockdev.Digest]blockdev.Digest) (*openImage, error) {
	if n := len(img.Layers); n == 0 || n > maxLayers {
		return nil, fmt.Errorf("image has %d layers, 1 to %d can be mounted: %w", n, maxLayers, blockdev.ErrUnsupported)
	}
	o := &openImage{imageRecord: imageRecord{
		Ref: w.ref, Host: w.host, Manifest: img.Manifest, Opened: time.Now().UTC(), Grant: img.Grant,
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
		o.chains = append(o.chains, c.String())
	}
	o.Top = o.chains[len(o.chains)-1]
	return o, nil
}

// add hands the image's indexes to the data path and mounts all of its diffs.
func (s *Snapshotter) add(ctx context.Context, o *openImage, img *image.Image) (err error) {
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
	release, err := s.refs.hold(ctx, ids...)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	if err := s.records.intend(ids); err != nil {
		return err
	}
	// Now, so that who else has the image is known by the time that prefetch begins.
	s.joinGroup(&o.imageRecord)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.leaveUnopened(o.Manifest))
		}
	}()

	implied := make([][]string, len(ids))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(openWorkers)
	for i, id := range ids {
		g.Go(func() (err error) {
			if enc := indexes[id]; enc != nil {
				if implied[i], err = s.addIndex(gctx, id, enc); err != nil {
					return err
				}
			}
			// Mounting now shows what this machine cannot do while there is still an
			// ordinary way to the image.
			if _, err := s.cfg.Data.Mount(gctx, id); err != nil {
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
	if err := s.records.opened(o.imageRecord, fresh); err != nil {
		return err
	}
	o.release = release
	return nil
}

// fetchStartup has the data path fetch, from now on and not when the container
// begins to wait for it, what earlier starts of the image have read.
func (s *Snapshotter) fetchStartup(img *image.Image) {
	var profiles []blockdev.DiffProfile
	for i, l := range img.Layers {
		again := slices.ContainsFunc(img.Layers[:i], func(o image.Layer) bool { return o.DiffID == l.DiffID })
		if len(l.Profile) > 0 && !again {
			profiles = append(profiles, blockdev.DiffProfile{Diff: l.DiffID, Profile: l.Profile})
		}
	}
	if len(profiles) > 0 {
		s.cfg.Data.FetchStartup(profiles)
	}
}

// addIndex adds one index that must be that of diff id, and returns its implied
// directories.
func (s *Snapshotter) addIndex(ctx context.Context, id blockdev.Digest, enc []byte) (implied []string, err error) {
	got, err := s.cfg.Data.AddChecked(ctx, enc, func(ix *blockdev.Index) error {
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
