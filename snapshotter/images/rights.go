package images

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/lru"
)

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
	own         Credentials // the node's; nil: it has none
	ownForPulls bool        // Config.NodeCredentials

	mu sync.Mutex
	m  *lru.Map[openKey, right]
	// keys are the credentials that have opened images, by repository, for as long
	// as these need sources.
	keys map[string]image.Credential
	// unclaimed are repositories whose last image was opened and not asked for; row
	// is how many there were since one was.
	unclaimed *lru.Map[string, struct{}]
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
	r.m.Add(key, right{cred, now.Add(rightLife)})
}

// find returns the credential that was shown for an image.
func (r *rights) find(key openKey, now time.Time) (image.Credential, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.m.Peek(key)
	if !ok || !now.Before(v.until) {
		return image.Credential{}, false
	}
	return v.cred, true
}

// drop forgets what was shown for an image: the pull that has shown it is over.
func (r *rights) drop(key openKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.m.Remove(key)
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
	r.unclaimed.Remove(name)
	r.row = 0
}

// disclaim notes that none was.
func (r *rights) disclaim(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unclaimed.Add(name, struct{}{})
	r.row++
}

// elsewhere says whether images of this repository go to another snapshotter.
func (r *rights) elsewhere(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.unclaimed.Contains(name) || r.row >= maxUnclaimed
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

// node is the node's own credential for an image.
func (r *rights) node(ctx context.Context, w Want) (image.Credential, error) {
	if r.own == nil {
		return image.Credential{}, nil
	}
	cred, err := r.own.Credential(ctx, w.Ref)
	if err != nil {
		return cred, fmt.Errorf("credential for %s: %w", w.Host, err)
	}
	return cred, nil
}

// pull is what an image is opened with that a Prepare asks for: what its
// pull has shown at the mirror. Without that, it is anybody's, unless the config
// lets pulls use the node's own.
func (r *rights) pull(ctx context.Context, w Want) (image.Credential, error) {
	if cred, ok := r.find(w.key(), time.Now()); ok || !r.ownForPulls {
		return cred, nil
	}
	return r.node(ctx, w)
}

// source is Catalogue.SourceCredential.
func (r *rights) source(ctx context.Context, ref string) (image.Credential, error) {
	w, err := NewWant(ref, blockdev.Digest{})
	if err != nil {
		return image.Credential{}, err
	}
	if cred, ok := r.key(w.Name); ok {
		return cred, nil
	}
	return r.node(ctx, w)
}
