package images

import (
	"context"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

// refs counts the uses of each diff. It is derived from the metadata at start and
// holds no lock while anybody waits or does I/O.
type refs struct {
	mu sync.Mutex
	m  map[blockdev.Digest]*use
}

// use of one diff. An entry stays in refs.m, even with nothing left in it, until
// the data path has removed the diff.
type use struct {
	snapshots int // committed lazy snapshots that name it
	holds     int // pulls under way that opened it
	kept      int // kept images that have it
	// removing is not nil while the data path removes the diff, and closed after.
	removing chan struct{}
}

func (u *use) idle() bool {
	return u.snapshots == 0 && u.holds == 0 && u.kept == 0 && u.removing == nil
}

func (r *refs) get(id blockdev.Digest) *use {
	u := r.m[id]
	if u == nil {
		if r.m == nil {
			r.m = make(map[blockdev.Digest]*use)
		}
		u = &use{}
		r.m[id] = u
	}
	return u
}

// hold keeps ids from being removed until release is called. It waits for
// removals of them that are under way.
func (r *refs) hold(ctx context.Context, ids ...blockdev.Digest) (release func(), err error) {
	held := make([]blockdev.Digest, 0, len(ids))
	release = sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, id := range held {
			r.m[id].holds--
		}
	})
	for _, id := range ids {
		for {
			r.mu.Lock()
			u := r.get(id)
			wait := u.removing
			if wait == nil {
				u.holds++
				held = append(held, id)
			}
			r.mu.Unlock()
			if wait == nil {
				break
			}
			select {
			case <-wait:
			case <-ctx.Done():
				release()
				return nil, ctx.Err()
			}
		}
	}
	return release, nil
}

// addSnapshot counts a snapshot. The caller holds the diff.
func (r *refs) addSnapshot(id blockdev.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.get(id).snapshots++
}

func (r *refs) dropSnapshot(id blockdev.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if u := r.m[id]; u != nil && u.snapshots > 0 {
		u.snapshots--
	}
}

// known makes an entry, so that a diff without use is found by unused.
func (r *refs) known(id blockdev.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.get(id)
}

// keep counts, by 1 or -1, an image that is kept. The caller holds the diffs of one
// that is to be. A count may be below zero for a moment, where an image is kept and
// released at the same time; that is in use, too.
func (r *refs) keep(ids []blockdev.Digest, by int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range ids {
		r.get(id).kept += by
	}
}

// onlyKept reports whether one of the diffs is used by kept images alone.
func (r *refs) onlyKept(ids []blockdev.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range ids {
		if u := r.m[id]; u != nil && u.kept > 0 && u.snapshots == 0 && u.holds == 0 && u.removing == nil {
			return true
		}
	}
	return false
}

// unused lists the diffs that may be removed.
func (r *refs) unused() []blockdev.Digest {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []blockdev.Digest
	for id, u := range r.m {
		if u.idle() {
			ids = append(ids, id)
		}
	}
	return ids
}

// startRemove claims a diff for removal; false: it has come into use again, or
// somebody else removes it. finishRemove must follow.
func (r *refs) startRemove(id blockdev.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.m[id]
	if u == nil || !u.idle() {
		return false
	}
	u.removing = make(chan struct{})
	return true
}

// finishRemove lets callers go on that wait for the diff. A diff that could not be
// removed stays listed as unused, to be tried again.
func (r *refs) finishRemove(id blockdev.Digest, removed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.m[id]
	close(u.removing)
	u.removing = nil
	if removed {
		delete(r.m, id)
	}
}
