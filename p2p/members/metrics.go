package members

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of a node's membership.
type metrics struct {
	reg           prometheus.Registerer
	refused       prometheus.Counter
	groupsRefused prometheus.Counter
	strangers     prometheus.Counter
	all           []prometheus.Collector
}

func newMetrics(n *Node, reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	gauge := func(name, help string, value func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			return float64(value())
		})
	}
	m := &metrics{
		reg:           reg,
		refused:       counter("shoal_node_joins_refused_total", "Times that a supernode has refused this node, or ended its membership."),
		groupsRefused: counter("shoal_node_groups_refused_total", "Times that a supernode has not let this node into an image's group."),
		strangers:     counter("shoal_node_strangers_total", "Connections of peers that were refused or ended because they are in no group of this node."),
	}
	m.all = []prometheus.Collector{
		gauge("shoal_node_supernodes", "Supernodes that this node is a member of now.", func() (joined int) {
			n.mu.Lock()
			defer n.mu.Unlock()
			for _, s := range n.super {
				if s.isJoined() {
					joined++
				}
			}
			return joined
		}),
		gauge("shoal_node_groups", "Images whose group this node has a list of.", func() (views int) {
			n.mu.Lock()
			defer n.mu.Unlock()
			for _, g := range n.groups {
				if g.view != nil {
					views++
				}
			}
			return views
		}),
		gauge("shoal_node_group_members", "Members on those lists, itself included; one that is in several groups counts several times.", func() (known int) {
			n.mu.Lock()
			defer n.mu.Unlock()
			for _, g := range n.groups {
				known += g.known()
			}
			return known
		}),
		m.refused, m.groupsRefused, m.strangers,
	}
	if reg == nil {
		return m, nil
	}
	for i, c := range m.all {
		if err := reg.Register(c); err != nil {
			for _, done := range m.all[:i] {
				reg.Unregister(done)
			}
			return nil, fmt.Errorf("members: metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all {
		m.reg.Unregister(c)
	}
}
