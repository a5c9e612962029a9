package cache

import (
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// Stats counts what a Cache did since it was opened.
type Stats struct {
	// DemandBytes, StartupBytes and PrefetchBytes came from the Source, by the
	// priority they were asked for with. Read-ahead counts as demand.
	DemandBytes, StartupBytes, PrefetchBytes int64
	// HeaderBytes came from the Source, too: pieces of header streams, which only
	// the proof reads.
	HeaderBytes int64
	// CopiedBytes were missing, but found on this disk.
	CopiedBytes int64
	// Missed is demand reads that had to wait for a chunk, Failed those of them
	// that ended with an error other than their caller's own.
	Missed, Failed int64
	// Waited is how long those reads took, all together.
	Waited time.Duration
	// NotKept is bytes that came for demand reads and were not stored, for lack of
	// room on the disk or a disk that takes no writes.
	NotKept int64
	// Used is what all diffs take of the disk now, in bytes, with what is reserved
	// for writes under way; Quota is Config.Quota.
	Used, Quota int64
	// CorruptChunks came from the Source with wrong bytes; DamagedChunks turned
	// out to be wrong or unreadable on this disk.
	CorruptChunks, DamagedChunks int64
	// Proven indexes were shown to be those of their DiffIDs, Quarantined ones
	// not to be.
	Proven, Quarantined int64
}

// Stats returns the counters.
func (c *Cache) Stats() Stats {
	n := &c.stats
	return Stats{
		DemandBytes: n.demand.Load(), StartupBytes: n.startup.Load(), PrefetchBytes: n.prefetch.Load(),
		HeaderBytes: n.headers.Load(), CopiedBytes: n.copied.Load(),
		Missed: n.missed.Load(), Failed: n.failed.Load(), Waited: time.Duration(n.waited.Load()),
		NotKept: n.notKept.Load(), Used: c.room.InUse(), Quota: c.cfg.Quota,
		CorruptChunks: n.corrupt.Load(), DamagedChunks: n.damaged.Load(),
		Proven: n.proven.Load(), Quarantined: n.quarantined.Load(),
	}
}

// Uses returns the bytes of demand requests in flight (waiting: requests), and those
// that reads hold of chunks that could not be written.
func (c *Cache) Uses() (demand, held blockdev.Use) { return c.demand.Use(), c.held.Use() }
