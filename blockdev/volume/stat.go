package volume

import (
	"context"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
)

// Stat is one diff, for people to look at.
type Stat struct {
	ID blockdev.Digest
	// Local of Total bytes of the masked diff are here.
	Local, Total int64
	// Complete: all of them, verified and synced.
	Complete bool
	// Dir is the mount point, "" if it is not mounted.
	Dir string
	// Lazy: mounted through FUSE.
	Lazy bool
	// Prefetch is what the queue does with it.
	Prefetch PrefetchState
	// Proof says whether its index is proven.
	Proof cache.ProofState
}

// Stats returns all diffs, in no order.
func (m *Manager) Stats() []Stat {
	vols := m.volumes()
	stats := make([]Stat, 0, len(vols))
	for _, v := range vols {
		stats = append(stats, m.stat(v))
	}
	return stats
}

// Stat returns one diff; false if there is no such diff.
func (m *Manager) Stat(id blockdev.Digest) (Stat, bool) {
	v, err := m.volume(id)
	if err != nil {
		return Stat{}, false
	}
	return m.stat(v), true
}

// FullUse is what a diff takes of the disk once it is complete, in bytes and inodes.
// The error wraps blockdev.ErrNotFound if there is no such diff.
func (m *Manager) FullUse(id blockdev.Digest) (bytes, inodes int64, err error) {
	v, err := m.volume(id)
	if err != nil {
		return 0, 0, err
	}
	return v.diff.FullUse()
}

func (m *Manager) stat(v *volume) Stat {
	d := v.diff.Stat()
	s := Stat{ID: v.id, Local: d.BytesPresent, Total: d.Bytes, Complete: d.Complete, Prefetch: m.queues.prefetches.state(v), Proof: d.Proof}
	s.Dir, s.Lazy, _ = v.mounted()
	return s
}

// Counters returns what the local diffs have counted since Open.
func (m *Manager) Counters() cache.Stats { return m.cache.Stats() }

// Waiting returns, for each of ages, how many reads wait for missing bytes and have
// done so for at least that long.
func (m *Manager) Waiting(ages ...time.Duration) []int { return m.conn.server.Waiting(ages...) }

// FailedReads returns how many reads through FUSE were answered with EIO.
func (m *Manager) FailedReads() int64 { return m.conn.server.Failed() }

// Check asks the FUSE mount something, and returns when it has been answered: by
// this process.
func (m *Manager) Check(ctx context.Context) error { return m.conn.check(ctx) }

// Uses are the limited things of a Manager.
type Uses struct {
	// Reads wait for missing bytes; Readers of them have a goroutine.
	Reads, Readers blockdev.Use
	// Prefetches, Proofs and Scrubs are layers.
	Prefetches, Proofs, Scrubs blockdev.Use
	// DemandBytes are in flight for demand reads (waiting: requests); HeldBytes are those
	// that reads hold because they could not be written.
	DemandBytes, HeldBytes blockdev.Use
}

// Uses returns how much of each is in use now.
func (m *Manager) Uses() (u Uses) {
	u.Reads, u.Readers = m.conn.server.Uses()
	u.Prefetches, u.Proofs, u.Scrubs = m.queues.prefetches.use(), m.queues.proofs.use(), m.queues.scrubs.use()
	u.DemandBytes, u.HeldBytes = m.cache.Uses()
	return u
}
