package images

import (
	"context"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	// wishInterval is how often wishes are looked at while bytes are missing.
	wishInterval = 2 * time.Second
	// wishPause is how far apart two looks are at least.
	wishPause = 200 * time.Millisecond
	// mountPatience is how long a snapshot that was given to containerd and is not
	// mounted yet counts as a container.
	mountPatience = time.Minute
	// pullPatience is how long a container may take to follow its pull. Until then its
	// start has the link for itself.
	pullPatience = 10 * time.Second
)

// wishes knows what wants which diffs whole, as the config says: containers that
// run, and pulls that no container has followed. Nobody tells a snapshotter that a
// container has ended, but its snapshot is not mounted any more then. Prefetch
// that nobody wants ends.
type wishes struct {
	data      Prefetcher
	afterExit bool // what a container has wanted is fetched to its end
	changed   chan struct{}

	mu         sync.Mutex
	containers map[string]*container // by key of the snapshot
	pulls      map[string]*pulled    // by key of the image record
	// ended are the diffs of containers that are gone, with afterExit, by key of the
	// snapshot, until they are complete or removed.
	ended map[string][]blockdev.Digest
	asked map[blockdev.Digest]struct{}
}

// container is an active snapshot or a view.
type container struct {
	id    string
	view  bool
	diffs []blockdev.Digest
	since time.Time // when containerd got its mounts last
	ran   bool      // and has mounted them
	found bool      // that was an earlier process
}

// pulled is an image that no container has followed.
type pulled struct {
	diffs []blockdev.Digest
	due   time.Time
}

func newWishes(data Prefetcher, afterExit bool) *wishes {
	return &wishes{
		data: data, afterExit: afterExit,
		changed:    make(chan struct{}, 1),
		containers: make(map[string]*container), pulls: make(map[string]*pulled), ended: make(map[string][]blockdev.Digest), asked: make(map[blockdev.Digest]struct{}),
	}
}

// start notes a container that wants its diffs whole, and has them fetched.
func (w *wishes) start(key string, c container) {
	w.mu.Lock()
	w.containers[key] = &c
	for _, id := range c.diffs {
		w.asked[id] = struct{}{}
	}
	w.data.Prefetch(c.diffs...)
	w.mu.Unlock()
	w.look()
}

// found notes an active snapshot of an earlier process: its container runs if it
// is mounted.
func (w *wishes) found(key string, c container) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, newer := w.containers[key]; !newer {
		c.found = true
		w.containers[key] = &c
	}
	w.look()
}

// end forgets the container of a snapshot that is gone, but not what it has wanted if
// that is still to be fetched.
func (w *wishes) end(key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, ok := w.containers[key]
	if !ok {
		return
	}
	delete(w.containers, key)
	if w.afterExit {
		w.ended[key] = c.diffs
	}
	w.look()
}

func (w *wishes) pull(key string, p pulled) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pulls[key] = &p
	w.look()
}

// await has an image fetched if no container follows its pull.
func (w *wishes) await(rec *imageRecord) {
	w.pull(string(rec.key()), pulled{diffs: rec.diffs(), due: time.Now().Add(pullPatience)})
}

func (w *wishes) follow(key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.pulls, key)
}

func (w *wishes) look() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// watch looks at the wishes until ctx ends. running is Snapshots.Mounted.
func (w *wishes) watch(ctx context.Context, running func() map[string]struct{}) {
	for {
		var again <-chan time.Time
		if next := w.review(time.Now(), running()); next > 0 {
			again = time.After(next)
		}
		select {
		case <-w.changed:
		case <-again:
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(wishPause):
		case <-ctx.Done():
			return
		}
	}
}

// review has the data path fetch what has come to be wanted, and stop with what is
// not wanted any more. It returns when to look again; 0: when something changes.
func (w *wishes) review(now time.Time, running map[string]struct{}) (next time.Duration) {
	w.mu.Lock() // across the calls as well, so that none undoes a later one: they only take notes
	defer w.mu.Unlock()
	var start, stop []blockdev.Digest
	wanted := make(map[blockdev.Digest]struct{})
	want := func(ids []blockdev.Digest) (missing bool) {
		for _, id := range ids {
			if !w.data.Incomplete(id) {
				continue
			}
			missing = true
			if _, again := wanted[id]; again {
				continue
			}
			wanted[id] = struct{}{}
			if _, ok := w.asked[id]; !ok {
				start = append(start, id)
			}
		}
		return missing
	}
	for _, c := range w.containers {
		_, mounted := running[c.id]
		c.ran = c.ran || mounted
		young := now.Sub(c.since) < mountPatience
		switch {
		case mounted, w.afterExit, c.view, running == nil, young && !c.ran && !c.found:
			if want(c.diffs) {
				next = wishInterval
			}
		case young && !c.ran: // the earlier process may have given it its mounts just now
			next = wishInterval
		}
	}
	for key, diffs := range w.ended {
		if want(diffs) {
			next = wishInterval
		} else {
			delete(w.ended, key)
		}
	}
	for key, p := range w.pulls {
		if wait := p.due.Sub(now); wait > 0 {
			if next == 0 || wait < next {
				next = wait
			}
		} else if want(p.diffs) {
			next = wishInterval
		} else {
			delete(w.pulls, key)
		}
	}
	for id := range w.asked {
		if _, ok := wanted[id]; !ok {
			stop = append(stop, id)
		}
	}
	w.asked = wanted
	w.data.StopPrefetch(stop...)
	w.data.Prefetch(start...)
	return next
}
