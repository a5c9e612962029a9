package metric

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func names(t *testing.T, reg *prometheus.Registry) (all []string) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		all = append(all, f.GetName())
	}
	return all
}

// All are registered or none, and what another owner has registered stays.
func TestSet(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	first, second := Set{Registerer: reg}, Set{Registerer: reg}
	if err := first.Register(Counter("b_total", "B."), Gauge("c", "C.", func() int { return 3 })); err != nil {
		t.Fatal(err)
	}
	if err := second.Register(Counter("a_total", "A."), Counter("b_total", "B.")); err == nil {
		t.Error("a name has two owners")
	}
	second.Unregister()
	if got := names(t, reg); len(got) != 2 || got[0] != "b_total" || got[1] != "c" {
		t.Errorf("registered: %v", got)
	}
	if err := first.Register(Counter("a_total", "A.")); err != nil {
		t.Fatal(err)
	}
	first.Unregister()
	first.Unregister()
	if got := names(t, reg); len(got) != 0 {
		t.Errorf("left behind: %v", got)
	}
	var none Set
	if err := none.Register(Counter("a_total", "A.")); err != nil {
		t.Error(err)
	}
	none.Unregister()
}
