package volume

import (
	"context"
	"errors"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
)

// ContainerStarts says that a container on these diffs is about to start: prefetch
// waits for it, and its first reads are recorded (Upstream.Profiles).
func (m *Manager) ContainerStarts(ids ...blockdev.Digest) {
	m.cache.ExpectDemand()
	m.startups.record(m.known(ids))
}

// known returns the volumes of those diffs that are there.
func (m *Manager) known(ids []blockdev.Digest) (vols []*volume) {
	for _, id := range ids {
		if v, err := m.volume(id); err == nil {
			vols = append(vols, v)
		}
	}
	return vols
}

// Prefetch fetches everything of these diffs in the background, in this order and
// behind what is queued already. Attempts that fail are repeated until they
// succeed, StopPrefetch ends them or the diff is removed. Unknown and complete
// diffs are passed over.
func (m *Manager) Prefetch(ids ...blockdev.Digest) {
	for _, v := range m.known(ids) {
		if !v.diff.Complete() {
			_, _ = m.queues.prefetches.add(v, false) // refused: it is being removed, or closed
		}
	}
}

// StopPrefetch ends what Prefetch has begun for these diffs. What has come stays.
// A diff that PrefetchWait waits for goes on, and so does one whose damage is being
// put right.
func (m *Manager) StopPrefetch(ids ...blockdev.Digest) {
	for _, v := range m.known(ids) {
		v.mu.Lock()
		stale := v.stale
		v.mu.Unlock()
		if !stale {
			m.queues.prefetches.pause(v)
		}
	}
}

// Incomplete reports whether a diff that is there has bytes that are not.
func (m *Manager) Incomplete(id blockdev.Digest) bool {
	v, err := m.volume(id)
	return err == nil && !v.diff.Complete()
}

// PrefetchWait prefetches one diff before all that are queued, and returns when
// every byte of it is on this node, verified and synced, and its index is proven.
// While it waits it calls progress (which may be nil) a few times a second, and
// once before the proof, with the bytes that are here and all there are. If an
// attempt fails it returns the cause at once, and the queue goes on trying, but
// for one that wraps blockdev.ErrQuarantined. If ctx ends, the prefetch goes on.
func (m *Manager) PrefetchWait(ctx context.Context, id blockdev.Digest, progress func(local, total int64)) error {
	v, err := m.volume(id)
	if err != nil {
		return err
	}
	defer v.diff.Hurry()()
	report := func() {
		if progress != nil {
			s := v.diff.Stat()
			progress(s.BytesPresent, s.Bytes)
		}
	}
	for {
		if !v.diff.Complete() {
			if err := m.queues.prefetches.await(ctx, v, report); err != nil {
				return err
			}
		}
		report()
		if v.diff.Proof() == cache.Proven {
			return nil
		}
		// Damage that the proof finds is fetched again.
		err := m.queues.proofs.await(ctx, v, report)
		if err != nil && !errors.Is(err, cache.ErrIncomplete) && !errors.Is(err, cache.ErrDamaged) {
			return err
		}
	}
}
