package cache

import (
	"sync/atomic"

	"github.com/shoalfs/shoal/blockdev"
)

// counters are what Stats is made of.
type counters struct {
	demand, startup, prefetch, headers, copied, missed, failed, waited, corrupt, damaged, notKept, proven, quarantined atomic.Int64
}

func (n *counters) fetched(prio blockdev.Priority, bytes int) {
	switch prio {
	case blockdev.Demand:
		n.demand.Add(int64(bytes))
	case blockdev.Startup:
		n.startup.Add(int64(bytes))
	default:
		n.prefetch.Add(int64(bytes))
	}
}
