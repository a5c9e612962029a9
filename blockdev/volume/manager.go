package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/mount"
	"github.com/shoalfs/shoal/internal/tasks"
)

// Config of a Manager. Root is required; the zero value of the rest means its default.
type Config struct {
	// Root is the directory of everything that a Manager keeps. It is made if it
	// is not there, for root only. No commas.
	Root string
	// Log takes warnings and errors.
	Log *slog.Logger
	// Cache is the configuration of the local diffs; its Root and Log are set from those
	// above, its Source, Inflight and MakeRoom are the Upstream's.
	Cache cache.Config
	// ReadTimeout bounds how long a process may wait for missing bytes, before it
	// gets EIO. Default: that of package fusefs.
	ReadTimeout time.Duration
	// Observe is fusefs.Options.Observe; nil: reads are not observed.
	Observe func(from blockdev.Origin, took time.Duration)
	// ReadFailed is fusefs.Options.Failed; nil: failed reads are not observed.
	ReadFailed func(id blockdev.Digest, why error)
	// PrefetchDiffs is how many diffs are prefetched at a time. Default 2.
	PrefetchDiffs int
	// ScrubInterval is how often everything that is here is read and checked, slowly.
	// Default a week; negative: never.
	ScrubInterval time.Duration
	// RetireAfter is how long a mount stays that another one has replaced (package
	// comment). Default 2 minutes: longer than containerd takes from the moment when it
	// learns of a mount to the container's start.
	RetireAfter time.Duration
	// Keep holds the FUSE descriptor when this process has ended, for the next
	// one; nil: there is none, and lazy mounts die with the process.
	Keep Keeper
	// Loop mounts through loop devices even where the kernel can do without.
	Loop bool
}

// Manager is a node's volumes.
type Manager struct {
	cfg      Config
	root     string // absolute, without symbolic links
	late     *late
	cache    *cache.Cache
	conn     *connection
	mounts   *mounter
	queues   *queues
	startups *startups
	chores   *tasks.Group // what else runs in the background

	mu   sync.RWMutex // guards the maps; never held across I/O
	vols map[blockdev.Digest]*volume
	// left are mounts of diffs that could not be opened yet.
	left   map[blockdev.Digest]leftMount
	closed bool
}

var errClosed = errors.New("the volume manager is closed")

// Add takes in an encoded index, and returns its DiffID. Data is not fetched
// before it is read or prefetched. Adding what is there is no error.
func (m *Manager) Add(ctx context.Context, encodedIndex []byte) (blockdev.Digest, error) {
	return m.add(ctx, func() (*cache.Diff, error) { return m.cache.Add(ctx, encodedIndex) })
}

// AddChecked is Add, but that it shows the decoded index to check; see cache.Cache's
// AddChecked.
func (m *Manager) AddChecked(ctx context.Context, encodedIndex []byte, check func(*blockdev.Index) error) (blockdev.Digest, error) {
	return m.add(ctx, func() (*cache.Diff, error) { return m.cache.AddChecked(ctx, encodedIndex, check) })
}

func (m *Manager) add(ctx context.Context, add func() (*cache.Diff, error)) (blockdev.Digest, error) {
	for {
		d, err := add()
		if err != nil {
			return blockdev.Digest{}, err
		}
		v, err := m.adopt(d)
		if err != nil {
			return d.ID(), err
		}
		if v.diff == diff(d) {
			return d.ID(), nil
		}
		// The volume of an earlier life of this diff. It is just being removed; or that
		// went wrong, and then nobody else ends it.
		if err := v.take(ctx); err != nil {
			return d.ID(), err
		}
		if _, _, gone := v.mounted(); !gone {
			m.cfg.Log.Error("the files of a mounted diff were removed; the diff is unmounted", "diff", v.id)
			err = m.mounts.unmount(v, true)
			m.forget(v)
		}
		v.give()
		if err != nil {
			return d.ID(), err
		}
	}
}

// adopt returns the volume of a diff, a new one if there is none.
func (m *Manager) adopt(d diff) (*volume, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, errClosed
	}
	if v, ok := m.vols[d.ID()]; ok {
		return v, nil
	}
	v := &volume{id: d.ID(), diff: d, turn: make(chan struct{}, 1)}
	if i, ok := m.left[v.id]; ok {
		delete(m.left, v.id)
		v.setMounted(i.dir, i.meta, i.lazy)
		for _, dir := range i.retired {
			v.retire(dir)
		}
	}
	m.vols[v.id] = v
	return v, nil
}

// forget ends a volume. The caller has its turn, and has taken away its mount.
func (m *Manager) forget(v *volume) {
	v.mu.Lock()
	v.gone = true
	v.mu.Unlock()
	m.mounts.forget(v.id) // before somebody can make a new volume of the diff
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.vols[v.id] == v {
		delete(m.vols, v.id)
	}
}

// volume returns the volume of a diff, also of one that could not be opened before.
func (m *Manager) volume(id blockdev.Digest) (*volume, error) {
	m.mu.RLock()
	v, ok := m.vols[id]
	closed := m.closed
	m.mu.RUnlock()
	if closed {
		return nil, errClosed
	}
	if ok {
		return v, nil
	}
	if d, ok := m.cache.Get(id); ok {
		return m.adopt(d)
	}
	return nil, fmt.Errorf("diff %s on this node: %w", id, blockdev.ErrNotFound)
}

// Diffs returns all diffs, in no order.
func (m *Manager) Diffs() []blockdev.Digest { return files{m}.List() }

// SetPrefetchRate changes cache.Config.PrefetchRate.
func (m *Manager) SetPrefetchRate(bytes int64) { m.cache.SetPrefetchRate(bytes) }

// Has says whether the node has the index of a diff.
func (m *Manager) Has(id blockdev.Digest) bool {
	_, err := m.volume(id)
	return err == nil
}

// Mount mounts a diff, if it is not mounted yet, and returns where: from the
// local file if the diff is complete, else through FUSE. One that is mounted in the
// other way is mounted again, elsewhere (package comment): callers that look into dir, or
// mount something over it, do so within a minute, or ask again, or have a bind mount of it,
// which stays. The error wraps
// blockdev.ErrNotFound if there is no such diff, blockdev.ErrUnsupported if this
// kernel cannot mount it, and blockdev.ErrQuarantined if it is not what its index
// said: then it may be mounted, for containers that read it already.
func (m *Manager) Mount(ctx context.Context, id blockdev.Digest) (dir string, err error) {
	v, err := m.volume(id)
	if err != nil {
		return "", err
	}
	if err := v.diff.Distrust(); err != nil {
		return "", err
	}
	if dir, _, gone := v.mounted(); dir != "" && !gone && v.matches() {
		return dir, nil
	}
	if err := v.take(ctx); err != nil {
		return "", err
	}
	defer v.give()
	dir, _, gone := v.mounted()
	switch {
	case gone:
		return "", fmt.Errorf("diff %s on this node: %w (just removed)", id, blockdev.ErrNotFound)
	case dir != "":
		m.mounts.matchNow(v)
		dir, _, _ = v.mounted()
		return dir, nil
	}
	return m.mounts.mount(v)
}

// Remove unmounts a diff, stops its prefetch and frees its bytes. It is the
// caller's to know that no container needs it. A mount that is still in use is
// taken out of the tree, and its users get errors for what they have not read.
// Removing what is not there is no error. If ctx ends while its prefetch is being
// stopped, the diff stays; later than that, it goes.
func (m *Manager) Remove(ctx context.Context, id blockdev.Digest) error {
	v, err := m.volume(id)
	for errors.Is(err, blockdev.ErrNotFound) {
		opened, rerr := m.removeUnopened(ctx, id)
		if rerr != nil || !opened {
			return rerr
		}
		v, err = m.volume(id) // added or opened in between, and perhaps mounted
	}
	if err != nil {
		return err
	}
	if err := v.take(ctx); err != nil {
		return err
	}
	defer v.give()
	if _, _, gone := v.mounted(); gone {
		return nil
	}
	if err := m.queues.stop(ctx, v); err != nil {
		return err
	}
	// From here on it is not to be left half done: the next caller would find a
	// layer without its mount, or the other way round.
	if err = m.mounts.unmount(v, true); err == nil {
		err = m.cache.Remove(context.WithoutCancel(ctx), id)
	}
	if d, ok := m.cache.Get(id); ok && diff(d) == v.diff {
		m.queues.allow(v)
		return err
	}
	m.forget(v) // also if files could not be deleted: they go at the next start
	return err
}

// removeUnopened removes a diff that could not be opened, if there is one. It returns
// true, and removes nothing, if the diff is open by now.
func (m *Manager) removeUnopened(ctx context.Context, id blockdev.Digest) (opened bool, err error) {
	m.mu.Lock()
	i, ok := m.left[id]
	delete(m.left, id)
	m.mu.Unlock()
	if ok {
		errs := []error{m.mounts.unmark(id)}
		for _, dir := range append(i.retired, i.dir) {
			errs = append(errs, mount.Detach(dir))
		}
		if err := errors.Join(errs...); err != nil {
			return false, fmt.Errorf("diff %s: %w", id, err)
		}
	}
	return m.cache.RemoveUnopened(ctx, id)
}

// Implied returns the directories that a diff's index implies; see blockdev.Index.
func (m *Manager) Implied(id blockdev.Digest) ([]string, error) {
	v, err := m.volume(id)
	if err != nil {
		return nil, err
	}
	ix, err := v.diff.Index()
	if err != nil {
		return nil, err
	}
	return ix.Implied, nil
}

// Forward finds chunks of a diff for another node: cache.Cache's Forward.
func (m *Manager) Forward(diff blockdev.Digest, prio blockdev.Priority, hops int, digests []blockdev.Digest) (*cache.Forward, error) {
	return m.cache.Forward(diff, prio, hops, digests)
}

// EncodedIndex returns the index of a diff for another node: cache.Cache's
// EncodedIndex.
func (m *Manager) EncodedIndex(diff blockdev.Digest) ([]byte, error) {
	return m.cache.EncodedIndex(diff)
}

// Offer takes a chunk of a diff that no reader has asked for but that has come by, if
// it is missing and there is room for it.
func (m *Manager) Offer(id, chunk blockdev.Digest, data []byte) {
	if d, ok := m.cache.Get(id); ok {
		d.Offer(chunk, data)
	}
}

// volumes returns all of them, in no order.
func (m *Manager) volumes() []*volume {
	m.mu.RLock()
	defer m.mu.RUnlock()
	vols := make([]*volume, 0, len(m.vols))
	for _, v := range m.vols {
		vols = append(vols, v)
	}
	return vols
}
