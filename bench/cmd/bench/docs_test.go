package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/report"
)

// TestReadme: the figures in the README are those of docs/benchmarks.md, which a run of
// the benchmarks has written.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../../docs/benchmarks.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(readme), tableBegins)
	table, _, ok := strings.Cut(rest, tableEnds)
	if !ok || !strings.Contains(table, "overlayfs") || !strings.Contains(string(page), table) {
		t.Errorf("the README's table is not that of docs/benchmarks.md:\n%s", table)
	}
}

// TestWriteDocs: rows become the page and the README's table.
func TestWriteDocs(t *testing.T) {
	top, out := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(top, "docs"), 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(path, text string) {
		if err := os.WriteFile(filepath.Join(top, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("README.md", "before\n"+tableBegins+"old\n"+tableEnds+"after\n")
	if err := putTable(filepath.Join(top, "README.md"), "table\n"); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(top, "README.md")); err != nil || string(b) != "before\n"+tableBegins+"table\n"+tableEnds+"after\n" {
		t.Errorf("README: %q, %v", b, err)
	}
	if err := writeDocs(out, top); err == nil || !strings.Contains(err.Error(), "make bench-start") {
		t.Errorf("without measurements: %v", err)
	}
	var r report.Report
	r.Note(secondsOf+"redis, overlayfs", "s", 4)
	r.Note(secondsOf+"redis, cold supernode", "s", 2)
	r.Note(secondsOf+"redis, warm supernode", "s", 1)
	if got := startTable(r.Rows); !strings.Contains(got, "| redis | 4.0 s | 2.0 s (0.50x) | 1.0 s (0.25x) |\n") {
		t.Errorf("table:\n%s", got)
	}
}
