package report

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

func TestRowsAreTheMedianOfTheirRuns(t *testing.T) {
	var r Report
	r.Add("odd", "s", AtMost, 2, 9, 1, 2)
	r.Add("even", "x", AtLeast, 3, 1, 3, 2, 8)
	dir := t.TempDir()
	if err := r.Save(dir, "x"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "x.json"))
	if err != nil {
		t.Fatal(err)
	}
	var rows []Row
	if err := json.Unmarshal(b, &rows); err != nil {
		t.Fatal(err)
	}
	want := []Row{
		{Name: "odd", Value: 2, Unit: "s", Cmp: AtMost, Bar: 2, Runs: 3, Min: 1, Max: 9},
		{Name: "even", Value: 2.5, Unit: "x", Cmp: AtLeast, Bar: 3, Runs: 4, Min: 1, Max: 8},
	}
	for i := range want {
		if rows[i] != want[i] {
			t.Errorf("row %d: got %+v, want %+v", i, rows[i], want[i])
		}
	}
	if !rows[0].Holds() || rows[1].Holds() {
		t.Errorf("Holds: got %v and %v, want true and false", rows[0].Holds(), rows[1].Holds())
	}
}
