package main

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// The table of docs/install.md has the rows that bench sizing measures, each with a
// figure, in the same order.
func TestSizingTable(t *testing.T) {
	b, err := os.ReadFile("../../../docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), "<!-- rows of make bench-sizing -->\n")
	table, _, end := strings.Cut(rest, "<!-- end of rows of make bench-sizing -->")
	if !ok || !end {
		t.Fatal("docs/install.md does not say where the table is")
	}
	var names []string
	for i, line := range strings.Split(strings.TrimSpace(table), "\n") {
		cells := strings.Split(line, "|")
		if i < 2 {
			continue // the head
		}
		if len(cells) < 4 || !strings.ContainsAny(cells[2], "0123456789") {
			t.Errorf("no figure in the row %q", line)
			continue
		}
		names = append(names, strings.TrimSpace(cells[1]))
	}
	if !slices.Equal(names, sizingRows) {
		t.Errorf("docs/install.md has the rows %q, bench sizing measures %q", names, sizingRows)
	}
}
