package roster

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/internal/metric"
)

// metrics of the member list.
type metrics struct {
	metric.Set
	joins         prometheus.Counter
	refused       *prometheus.CounterVec
	expired       prometheus.Counter
	groupsRefused prometheus.Counter
	strangers     prometheus.Counter
	tokenErrors   prometheus.Counter
	pushes        prometheus.Counter
	pushBytes     prometheus.Counter
}

func newMetrics(l *List, reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return metric.Counter("shoal_supernode_"+name, help)
	}
	gauge := func(name, help string, value func() int) prometheus.Collector {
		return metric.Gauge("shoal_supernode_"+name, help, func() int {
			l.mu.Lock()
			defer l.mu.Unlock()
			return value()
		})
	}
	m := &metrics{
		Set:   metric.Set{Registerer: reg},
		joins: counter("joins_total", "Times that a node was let in."),
		refused: metric.CounterVec("shoal_supernode_joins_refused_total",
			"Times that a node was not let in, by reason: token, revoked, identity (two nodes with the same one), limit, invalid.", "reason"),
		expired:       counter("leases_expired_total", "Memberships that ended because the node was silent."),
		groupsRefused: counter("groups_refused_total", "Times that a node was not let into an image's group."),
		strangers:     counter("strangers_total", "Connections and streams that were refused or ended because the peer has not joined, or is revoked."),
		tokenErrors:   counter("token_file_errors_total", "Times that the token file had changed and could not be read."),
		pushes:        counter("group_updates_total", "Messages to nodes about the members of a group."),
		pushBytes:     counter("group_update_bytes_total", "Bytes of the messages to nodes about the members of a group."),
	}
	return m, m.Register(
		gauge("members", "Nodes that are members.", func() int { return len(l.members) }),
		gauge("groups", "Images that at least one member has.", func() int { return len(l.groups) }),
		gauge("holders", "Members that have all of an image, counted for each of their images.", func() int { return l.holders }),
		m.joins, m.refused, m.expired, m.groupsRefused, m.strangers, m.tokenErrors, m.pushes, m.pushBytes,
	)
}
