// Package gauges makes metrics of what is limited: slots, queues and memory. A label
// "of" names the limited thing and a label "state" is used, waiting or capacity, so that
// one query shows all things that are full.
package gauges

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
)

// Collector reads uses when a scrape asks for them.
type Collector struct {
	desc *prometheus.Desc
	of   map[string]func() blockdev.Use
}

// New returns a Collector of one metric. The functions of of are called at each scrape;
// they do not wait.
func New(name, help string, of map[string]func() blockdev.Use) *Collector {
	return &Collector{desc: prometheus.NewDesc(name, help, []string{"of", "state"}, nil), of: of}
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	names := make([]string, 0, len(c.of))
	for name := range c.of {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		use := c.of[name]()
		for _, v := range []struct {
			state string
			value int64
		}{{"used", use.Used}, {"waiting", use.Waiting}, {"capacity", use.Capacity}} {
			ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(v.value), name, v.state)
		}
	}
}
