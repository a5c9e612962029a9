package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/reference"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// The registry mirror sees a pull before this package does, with the credential
// that containerd has for it. What it reports here (Show, Begin) is the only thing
// that opens a private image: labels of a snapshot can come from anybody's manifest.

const (
	// rightLife is for how long a pull's credential is remembered for the Prepares
	// that follow.
	rightLife = 15 * time.Minute
	maxRights = 4096
	// claimTime is for how long an image that was opened ahead waits for its first
	// Prepare. What none comes for is pulled for another snapshotter.
	claimTime = time.Minute
	// maxUnclaimed is how many such images in a row make it the rule.
	maxUnclaimed = 3
	// distrustFor is for how long a namespace is distrusted. It is longer than rightLife,
	// so that no right outlives it: a pull that shows one asks for layers right after.
	distrustFor = time.Hour
	// sweepKeys is how often credentials are looked through that are of no more use.
	sweepKeys = time.Minute
)

// right is a credential that a pull has shown for a manifest.
type right struct {
	cred  image.Credential
	until time.Time
}

// rights are what pulls have shown, and which of them came for another snapshotter.
type rights struct {
	mu sync.Mutex
	m  map[openKey]right
	// keys are the credentials that have opened images, by repository, for as long
	// as these need sources.
	keys map[string]image.Credential
	// unclaimed are repositories whose last image was opened and not asked for; row
	// is how many there were since one was.
	unclaimed map[string]struct{}
	row       int
	// distrusts are containerd's namespaces in which a layer was asked for without the
	// name of its image, and until when that counts. There containerd does not write the
	// names (disable_snapshot_annotations = true, CRI's default), so a name that
	// comes all the same is an annotation of a manifest, which anybody can write.
	distrusts map[string]time.Time
}

func (r *rights) show(key openKey, cred image.Credential, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m == nil {
		r.m = make(map[openKey]right)
	}
	if len(r.m) >= maxRights {
		for k, old := range r.m {
			if !now.Before(old.until) || len(r.m) >= maxRights {
				delete(r.m, k)
			}
		}
	}
	r.m[key] = right{cred, now.Add(rightLife)}
}

// find returns the credential that was shown for an image.
func (r *rights) find(key openKey, now time.Time) (image.Credential, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.m[key]
	if ok && !now.Before(v.until) {
		delete(r.m, key)
		ok = false
	}
	if !ok {
		return image.Credential{}, false
	}
	return v.cred, true
}

// drop forgets what was shown for an image: the pull that has shown it is over.
func (r *rights) drop(key openKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.m, key)
}

// distrust notes that a namespace does not name its images.
func (r *rights) distrust(namespace string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.distrusts == nil {
		r.distrusts = make(map[string]time.Time)
	}
	r.distrusts[namespace] = now.Add(distrustFor)
}

// distrusted says whether names of images are believed of nobody in a namespace.
func (r *rights) distrusted(namespace string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return now.Before(r.distrusts[namespace])
}

// claim notes that a layer of an image of this repository was asked for.
func (r *rights) claim(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.unclaimed, name)
	r.row = 0
}

// disclaim notes that none was.
func (r *rights) disclaim(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unclaimed == nil || len(r.unclaimed) >= maxRights {
		r.unclaimed = make(map[string]struct{})
	}
	r.unclaimed[name] = struct{}{}
	r.row++
}

// elsewhere says whether images of this repository go to another snapshotter.
func (r *rights) elsewhere(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, before := r.unclaimed[name]
	return before || r.row >= maxUnclaimed
}

func (r *rights) keep(name string, cred image.Credential) {
	if cred == (image.Credential{}) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.keys == nil {
		r.keys = make(map[string]image.Credential)
	}
	r.keys[name] = cred
}

func (r *rights) key(name string) (image.Credential, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cred, ok := r.keys[name]
	return cred, ok
}

// dropKeys forgets the credentials of repositories that needed does not have.
func (r *rights) dropKeys(needed map[string]struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name := range r.keys {
		if _, ok := needed[name]; !ok {
			delete(r.keys, name)
		}
	}
}

// Show implements mirror.Opener: a pull has been given this manifest, or image
// index, on the word of the registry for this credential. name is host/repository.
func (s *Snapshotter) Show(name string, manifest blockdev.Digest, cred image.Credential) {
	s.rights.show(openKey{name: name, manifest: manifest}, cred, time.Now())
}

// Begin implements mirror.Opener: it begins to open an image on the word of the
// registry for this credential, and returns at once.
func (s *Snapshotter) Begin(name, tag string, manifest blockdev.Digest, cred image.Credential) {
	w, err := aheadOf(name, tag, manifest)
	if err != nil || s.policy.Load().NotLazy(w.ref) != "" {
		return
	}
	s.Show(name, manifest, cred)
	if s.rights.elsewhere(name) || s.here(manifest) {
		return
	}
	s.openings.leave(s.openings.join(w.key(), true, s.opener(w, cred)), false)
}

// aheadOf is what the mirror knows of an image.
func aheadOf(name, tag string, manifest blockdev.Digest) (want, error) {
	ref := name + "@" + manifest.String()
	if tag != "" {
		ref = name + ":" + tag
	}
	spec, err := reference.Parse(ref)
	return want{ref: ref, name: name, host: spec.Hostname(), manifest: manifest}, err
}

// Await implements mirror.Opener: it returns when containerd may begin to unpack
// the image: it is open, and for an eager one every byte is here and proven; it
// cannot be opened; or ctx has ended.
func (s *Snapshotter) Await(ctx context.Context, name string, manifest blockdev.Digest) {
	key := openKey{name: name, manifest: manifest}
	for attempt := 0; ; attempt++ {
		o := s.openings.find(key)
		if o == nil {
			return
		}
		select {
		case <-o.done:
		case <-ctx.Done():
			s.openings.leave(o, false)
			return
		}
		if o.err == nil {
			if s.policy.Load().Eager(o.image.Ref) {
				s.waitBytes(ctx, o.image)
			}
			s.openings.leave(o, false)
			return
		}
		s.openings.leave(o, false)
		// It may have been somebody else's credential that was refused.
		cred, ok := s.rights.find(key, time.Now())
		if attempt > 0 || !ok || cred == o.cred || !errors.Is(o.err, blockdev.ErrUnauthorized) {
			return
		}
		w, err := aheadOf(name, "", manifest)
		if err != nil {
			return
		}
		s.openings.leave(s.openings.join(key, true, s.opener(w, cred)), false)
	}
}

// waitBytes waits until every byte of an image is here and proven. A failure leaves
// it lazy, with a line in the log.
func (s *Snapshotter) waitBytes(ctx context.Context, o *openImage) {
	for _, l := range o.Layers {
		s.cfg.Data.Prefetch(l.DiffID)
	}
	for _, l := range o.Layers {
		if err := s.cfg.Data.PrefetchWait(ctx, l.DiffID, nil); err != nil {
			if ctx.Err() == nil {
				s.log.Error("an eager image is not complete; its pull ends now, and the missing chunks are prefetched",
					"image", o.Ref, "layer", l.Digest, "error", err)
			}
			return
		}
	}
}

// here says whether the image with this manifest is lazy on this node already.
func (s *Snapshotter) here(manifest blockdev.Digest) bool {
	list, err := s.records.images()
	if err != nil {
		return false
	}
	for _, img := range list {
		if img.Manifest == manifest && s.hasChain(img.Top) {
			return true
		}
	}
	return false
}

func (s *Snapshotter) hasChain(top string) bool {
	chains, err := s.lazyChains(s.base)
	_, ok := chains[top]
	return err == nil && ok
}

// notClaimed is told of an opening that no Prepare has asked for.
func (s *Snapshotter) notClaimed(o *opening) {
	if o.image != nil && !s.hasChain(o.image.Top) {
		s.rights.disclaim(o.key.name)
	}
}

// pullCredential is what an image is opened with that a Prepare asks for: what its
// pull has shown at the mirror. Without that, it is anybody's, unless the config
// lets pulls use the node's own.
func (s *Snapshotter) pullCredential(ctx context.Context, w want) (image.Credential, error) {
	if cred, ok := s.rights.find(w.key(), time.Now()); ok {
		return cred, nil
	}
	if !s.cfg.NodeCredentials || s.cfg.Credentials == nil {
		return image.Credential{}, nil
	}
	cred, err := s.cfg.Credentials.Credential(ctx, w.ref)
	if err != nil {
		return cred, fmt.Errorf("credential for %s: %w", w.host, err)
	}
	return cred, nil
}

// SourceCredential is what the sources of an image's bytes are asked with that is
// on this node already: what it was pulled with, and else the node's own. It opens
// nothing new.
func (s *Snapshotter) SourceCredential(ctx context.Context, ref string) (image.Credential, error) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return image.Credential{}, fmt.Errorf("image reference %q: %w", ref, err)
	}
	if cred, ok := s.rights.key(nameOf(spec)); ok {
		return cred, nil
	}
	if s.cfg.Credentials == nil {
		return image.Credential{}, nil
	}
	return s.cfg.Credentials.Credential(ctx, ref)
}

// nameOf is host/repository, with the host in lower case.
func nameOf(spec reference.Spec) string {
	host, repo, _ := strings.Cut(spec.Locator, "/")
	return strings.ToLower(host) + "/" + repo
}

// forgetKeys drops, now and then, the credentials of repositories none of whose
// images still needs a source.
func (s *Snapshotter) forgetKeys(ctx context.Context) {
	tick := time.NewTicker(sweepKeys)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.dropKeys(); err != nil {
			s.log.Error("cannot find out which credentials are still needed; all are kept", "error", err)
		}
	}
}

func (s *Snapshotter) dropKeys() error {
	list, err := s.records.images()
	if err != nil {
		return err
	}
	needed := make(map[string]struct{})
	for _, img := range list {
		spec, err := reference.Parse(img.Ref)
		if err != nil {
			continue
		}
		for _, id := range img.diffs() {
			if !s.cfg.Data.Has(id) || s.cfg.Data.Incomplete(id) {
				needed[nameOf(spec)] = struct{}{}
				break
			}
		}
	}
	s.rights.dropKeys(needed)
	return nil
}

// local says why an image cannot be asked of a supernode on another machine.
func (s *Snapshotter) local(w want) string {
	if s.cfg.Remote && policy.LocalHost(w.host) {
		return fmt.Sprintf("%s is a name that only this machine knows, and the supernode runs on another machine", w.host)
	}
	return ""
}
