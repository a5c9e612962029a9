package control

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

func TestCheck(t *testing.T) {
	want := &CheckReport{Role: "node", Result: Damaged, Layers: 3, Bytes: 1 << 40, Findings: []blockdev.Finding{{Where: "layer x", Problem: "gone"}}}
	var asked CheckRequest
	c, _ := serve(t, fake{check: func(_ context.Context, req CheckRequest, event func(string)) (*CheckReport, error) {
		asked = req
		event("layer a")
		event("layer b")
		return want, nil
	}})
	var seen []string
	got, err := c.Check(t.Context(), CheckRequest{Repair: true}, func(what string) { seen = append(seen, what) })
	if err != nil || !reflect.DeepEqual(got, want) || !asked.Repair || strings.Join(seen, ", ") != "layer a, layer b" {
		t.Errorf("%+v, %v; asked %+v, events %q", got, err, asked, seen)
	}
	c, _ = serve(t, fake{check: func(context.Context, CheckRequest, func(string)) (*CheckReport, error) {
		return nil, errors.New("disk on fire")
	}})
	if _, err := c.Check(t.Context(), CheckRequest{}, func(string) {}); err == nil || !strings.Contains(err.Error(), "disk on fire") {
		t.Errorf("%v does not say what the daemon said", err)
	}
	if _, err := (Client{Path: c.Path + "x"}).Check(t.Context(), CheckRequest{}, func(string) {}); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("no daemon: %v", err)
	}
}

func TestJudge(t *testing.T) {
	repaired, not := blockdev.Finding{Repaired: "removed"}, blockdev.Finding{}
	for _, c := range []struct {
		findings []blockdev.Finding
		repair   bool
		want     string
	}{
		{nil, true, Clean},
		{nil, false, Clean},
		{[]blockdev.Finding{repaired}, true, Repaired},
		{[]blockdev.Finding{repaired}, false, Damaged},
		{[]blockdev.Finding{repaired, not}, true, Damaged},
		{[]blockdev.Finding{not, repaired}, true, Damaged},
	} {
		r := &CheckReport{Findings: c.findings}
		if r.Judge(c.repair); r.Result != c.want {
			t.Errorf("%+v, repair %v: %s, want %s", c.findings, c.repair, r.Result, c.want)
		}
	}
}
