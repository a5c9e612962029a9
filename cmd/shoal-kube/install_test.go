package main

import (
	"strings"
	"testing"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/join"
)

// TestNodeConfig: the machine's labels say where it is, unless the operator says so.
func TestNodeConfig(t *testing.T) {
	labels := map[string]string{zoneLabel: "z1", "example.com/rack": "r7"}
	info := join.Info{Supernodes: []string{"ID@10.96.0.7:7700"}}
	for _, c := range []struct {
		operator, rackLabel string
		labels              map[string]string
		want, not           []string
	}{
		{"", "example.com/rack", labels, []string{"version = 1", "zone = 'z1'", "rack = 'r7'", "supernodes = ['ID@10.96.0.7:7700']"}, nil},
		{"zone = \"here\"\n", "", labels, []string{"zone = 'here'"}, []string{"z1", "r7"}},
		{"", "example.com/rack", nil, []string{"version = 1"}, []string{"zone", "rack"}},
	} {
		got, err := nodeConfig(c.operator, info, c.labels, c.rackLabel)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("no %s in\n%s", want, got)
			}
		}
		for _, not := range c.not {
			if strings.Contains(got, not) {
				t.Errorf("%s is in\n%s", not, got)
			}
		}
	}
	if _, err := nodeConfig("supernodes = []\n", info, nil, ""); err == nil || !strings.Contains(err.Error(), "supernodes") {
		t.Errorf("supernodes of the operator: %v", err)
	}
}
