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
	r.Note("no bar", "x", 1e9)
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
		{Name: "no bar", Value: 1e9, Unit: "x", Runs: 1, Min: 1e9, Max: 1e9},
	}
	for i := range want {
		if rows[i] != want[i] {
			t.Errorf("row %d: got %+v, want %+v", i, rows[i], want[i])
		}
	}
	if !rows[0].Holds() || rows[1].Holds() || !rows[2].Holds() {
		t.Errorf("Holds: got %v, %v and %v, want true, false and true", rows[0].Holds(), rows[1].Holds(), rows[2].Holds())
	}
}
