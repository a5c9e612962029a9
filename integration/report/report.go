// Package report keeps what a benchmark measured, and writes it as JSON: one row
// for each line of a table of bars. A row holds figures of the run that wrote
// it, and nothing else; a bar that was missed is a row like any other.
package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
)

// Cmp says on which side of the bar a value should be.
type Cmp string

// AtMost and AtLeast are the two sides.
const (
	AtMost  Cmp = "<="
	AtLeast Cmp = ">="
)

// Row is one measured figure beside its bar; without Cmp it has none, and is
// there to explain the others.
type Row struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"` // the median of the runs
	Unit  string  `json:"unit"`
	Cmp   Cmp     `json:"cmp,omitempty"`
	Bar   float64 `json:"bar"` // 0 is a bar, too, if Cmp is not empty
	Runs  int     `json:"runs"`
	Min   float64 `json:"min"`
	Max   float64 `json:"max"`
}

// Holds says whether the value is on the bar's right side.
func (r Row) Holds() bool {
	switch r.Cmp {
	case AtLeast:
		return r.Value >= r.Bar
	case AtMost:
		return r.Value <= r.Bar
	}
	return true
}

// Report collects the rows of one measuring target.
type Report struct {
	Rows []Row
}

// Add adds a row with the median of samples, of which there must be one at least.
func (r *Report) Add(name, unit string, cmp Cmp, bar float64, samples ...float64) {
	s := slices.Clone(samples)
	slices.Sort(s)
	n := len(s)
	median := s[n/2]
	if n%2 == 0 {
		median = (s[n/2-1] + s[n/2]) / 2
	}
	r.Rows = append(r.Rows, Row{Name: name, Value: median, Unit: unit, Cmp: cmp, Bar: bar, Runs: n, Min: s[0], Max: s[n-1]})
}

// Note adds a row without a bar.
func (r *Report) Note(name, unit string, samples ...float64) {
	r.Add(name, unit, "", 0, samples...)
}

// Keep adds the rows of DIR/NAME.json, if there is one, that this Report has no
// newer ones of: what a run of a part of the target did not measure.
func (r *Report) Keep(dir, name string) error {
	b, err := os.ReadFile(filepath.Join(dir, name+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var old []Row
	if err := json.Unmarshal(b, &old); err != nil {
		return fmt.Errorf("%s.json: %w", name, err)
	}
	for _, row := range old {
		if !slices.ContainsFunc(r.Rows, func(x Row) bool { return x.Name == row.Name }) {
			r.Rows = append(r.Rows, row)
		}
	}
	return nil
}

// Save writes DIR/NAME.json.
func (r *Report) Save(dir, name string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(r.Rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".json"), append(b, '\n'), 0o644)
}

// Print shows the rows as a table.
func (r *Report) Print(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "WHAT\tVALUE\tBAR\t\tMIN\tMAX\tRUNS")
	for _, row := range r.Rows {
		mark, bar := "ok", fmt.Sprintf("%s %.4g", row.Cmp, row.Bar)
		switch {
		case row.Cmp == "":
			mark, bar = "", ""
		case !row.Holds():
			mark = "MISSED"
		}
		fmt.Fprintf(tw, "%s\t%.4g %s\t%s\t%s\t%.4g\t%.4g\t%d\n", row.Name, row.Value, row.Unit, bar, mark, row.Min, row.Max, row.Runs)
	}
	return tw.Flush()
}
