package metric

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
)

func TestUses(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(Uses("places", "Places.", map[string]func() blockdev.Use{
		"ingests": func() blockdev.Use { return blockdev.Use{Used: 3, Waiting: 2, Capacity: 4} },
		"scrubs":  func() blockdev.Use { return blockdev.Use{Capacity: 1} },
	}))
	families, err := reg.Gather()
	if err != nil || len(families) != 1 {
		t.Fatalf("%v, %v", families, err)
	}
	got := map[string]float64{}
	for _, m := range families[0].GetMetric() {
		got[m.GetLabel()[0].GetValue()+" "+m.GetLabel()[1].GetValue()] = m.GetGauge().GetValue()
	}
	for name, want := range map[string]float64{"ingests used": 3, "ingests waiting": 2, "ingests capacity": 4, "scrubs used": 0, "scrubs capacity": 1} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
	}
}
