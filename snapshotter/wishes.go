package snapshotter

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/moby/sys/mountinfo"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/policy"
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

// wishes knows who wants which diffs whole, as the config says: containers that
// run, and pulls that no container has followed. Nobody tells a snapshotter that a
// container has ended, but its snapshot is not mounted any more then. Prefetch
// that nobody wants ends.
type wishes struct {
	data      Prefetcher
	afterExit bool // what a container has wanted is fetched to its end
	// running returns the ids of mounted snapshots; nil: that is not known.
	running func() map[string]struct{}
	changed chan struct{}

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

// newWishes takes the snapshotter's root, to know its mounts.
func newWishes(data Prefetcher, root string, afterExit bool) *wishes {
	prefix := escapeOption(filepath.Join(root, "s") + string(filepath.Separator))
	return &wishes{
		data: data, afterExit: afterExit,
		running:    func() map[string]struct{} { return mountedIDs(prefix) },
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

// watch looks at the wishes until ctx ends.
func (w *wishes) watch(ctx context.Context) {
	for {
		var again <-chan time.Time
		if next := w.review(time.Now()); next > 0 {
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
func (w *wishes) review(now time.Time) (next time.Duration) {
	running := w.running()
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

// escapeOption writes a path as the kernel does in the options of a mount.
func escapeOption(path string) string {
	var b strings.Builder
	for _, c := range []byte(path) {
		if strings.IndexByte(", \t\n\\", c) >= 0 {
			fmt.Fprintf(&b, "\\%03o", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// mountedIDs returns the ids of the snapshots below prefix that are the upper
// directory of an overlay; nil: the mounts cannot be read.
func mountedIDs(prefix string) map[string]struct{} {
	ids := make(map[string]struct{})
	_, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		if i.FSType != "overlay" {
			return true, false
		}
		for option := range strings.SplitSeq(i.VFSOptions, ",") {
			if upper, ok := strings.CutPrefix(option, "upperdir="+prefix); ok {
				id, _, _ := strings.Cut(upper, string(filepath.Separator))
				ids[id] = struct{}{}
			}
		}
		return true, false
	})
	if err != nil {
		return nil
	}
	return ids
}

// containerStarts has what a container may need fetched, as the config says: from
// the top, where the image's own program is; what is below is more often shared, and
// here already.
func (s *Snapshotter) containerStarts(key, id string, info snapshots.Info, links []link) {
	if _, unpack := info.Labels[labelRef]; unpack {
		return
	}
	ids := unique(diffsOf(links))
	if len(ids) == 0 {
		return
	}
	s.cfg.Data.ContainerStarts(ids...)
	mode, images := s.imagesOf(links)
	for _, rec := range images {
		s.wishes.follow(string(rec.key()))
		if !rec.Unfollowed {
			continue
		}
		if err := s.records.followed(&rec); err != nil {
			s.log.Error("cannot record that a container uses a pulled image; after a restart the whole image is prefetched", "image", rec.Ref, "error", err)
		}
	}
	if mode == policy.All {
		s.wishes.start(key, container{id: id, view: info.Kind == snapshots.KindView, diffs: ids, since: time.Now()})
	}
}

// wish takes up that of a container which an earlier process has known.
func (s *Snapshotter) wish(ctx context.Context, key string, info snapshots.Info, links []link) {
	ids := unique(diffsOf(links))
	if _, unpack := info.Labels[labelRef]; unpack || len(ids) == 0 {
		return
	}
	if mode, _ := s.imagesOf(links); mode != policy.All {
		return
	}
	var id string
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return // removed since
	}
	s.wishes.found(key, container{id: id, view: info.Kind == snapshots.KindView, diffs: ids, since: time.Now()})
}

// imagesOf returns the images that a chain is, and the mode of prefetch that wants
// most of it. A chain that no image on record is has the mode of no image in
// particular.
func (s *Snapshotter) imagesOf(links []link) (policy.Mode, []imageRecord) {
	i := slices.IndexFunc(links, func(l link) bool { return l.chain != "" })
	list, err := s.records.images()
	if err != nil {
		s.log.Error("cannot look up the image of a container", "error", err)
	}
	var found []imageRecord
	for _, rec := range list {
		if i >= 0 && rec.Top == links[i].chain {
			found = append(found, rec)
		}
	}
	if len(found) == 0 {
		return s.policy.Load().Prefetch(""), nil
	}
	most := policy.None
	for _, rec := range found {
		switch mode := s.policy.Load().Prefetch(rec.Ref); {
		case mode == policy.All, mode == policy.Startup && most == policy.None:
			most = mode
		}
	}
	return most, found
}

// imagePulled notes the end of a pull, and has the image fetched if no container
// follows.
func (s *Snapshotter) imagePulled(rec *imageRecord) {
	unfollowed := s.cfg.PrefetchAfterPull && s.policy.Load().Prefetch(rec.Ref) == policy.All
	if err := s.records.pulled(*rec, unfollowed); err != nil {
		s.log.Error("cannot record a pull; if the node restarts, the rest of the image is not prefetched before a container starts", "image", rec.Ref, "error", err)
	}
	if !unfollowed {
		return
	}
	s.wishes.pull(string(rec.key()), pulled{diffs: rec.diffs(), due: time.Now().Add(pullPatience)})
}

// startWishes takes up the wishes of an earlier process.
func (s *Snapshotter) startWishes() error {
	list, err := s.records.images()
	if err != nil {
		return err
	}
	for _, rec := range list {
		if rec.Unfollowed && s.cfg.PrefetchAfterPull && s.policy.Load().Prefetch(rec.Ref) == policy.All {
			s.wishes.pull(string(rec.key()), pulled{diffs: rec.diffs(), due: time.Now().Add(pullPatience)})
		}
	}
	return nil
}
