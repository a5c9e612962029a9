package metric

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
)

// usesCollector reads uses when a scrape asks for them.
type usesCollector struct {
	desc *prometheus.Desc
	of   map[string]func() blockdev.Use
}

// Uses is one metric of all that is limited in one way: slots, queues or memory. A label
// "of" names the limited thing and a label "state" is used, waiting or capacity, so that
// one query shows all things that are full. The functions of of are called at each
// scrape; they do not wait.
func Uses(name, help string, of map[string]func() blockdev.Use) prometheus.Collector {
	return &usesCollector{desc: prometheus.NewDesc(name, help, []string{"of", "state"}, nil), of: of}
}

// Describe implements prometheus.Collector.
func (c *usesCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

// Collect implements prometheus.Collector.
func (c *usesCollector) Collect(ch chan<- prometheus.Metric) {
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
