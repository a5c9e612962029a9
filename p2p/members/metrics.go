package members

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/internal/metric"
)

// metrics of a node's membership.
type metrics struct {
	metric.Set
	refused       prometheus.Counter
	groupsRefused prometheus.Counter
	strangers     prometheus.Counter
}

func newMetrics(n *Node, reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		Set:           metric.Set{Registerer: reg},
		refused:       metric.Counter("shoal_node_joins_refused_total", "Times that a supernode has refused this node, or ended its membership."),
		groupsRefused: metric.Counter("shoal_node_groups_refused_total", "Times that a supernode has not let this node into an image's group."),
		strangers:     metric.Counter("shoal_node_strangers_total", "Connections that were refused or ended because the peer is in no group of this node."),
	}
	return m, m.Register(
		metric.Gauge("shoal_node_supernodes", "Supernodes that this node is a member of now.", func() (joined int) {
			n.mu.Lock()
			defer n.mu.Unlock()
			for _, s := range n.super {
				if s.isJoined() {
					joined++
				}
			}
			return joined
		}),
		metric.Gauge("shoal_node_groups", "Images whose group this node has a list of.", func() (views int) {
			n.mu.Lock()
			defer n.mu.Unlock()
			for _, g := range n.groups {
				if g.view != nil {
					views++
				}
			}
			return views
		}),
		metric.Gauge("shoal_node_group_members", "Members on the lists of groups, this node included; a member of several groups counts several times.", func() (known int) {
			n.mu.Lock()
			defer n.mu.Unlock()
			for _, g := range n.groups {
				known += g.known()
			}
			return known
		}),
		m.refused, m.groupsRefused, m.strangers,
	)
}
