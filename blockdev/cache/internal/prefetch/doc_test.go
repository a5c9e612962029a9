package prefetch

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPage: every knob on the page exists, in the package that the page names.
func TestPage(t *testing.T) {
	page, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	knobs := regexp.MustCompile(`(?m)^//\t(here|[a-z0-9]+/[a-z0-9/]+) ([\w.]+) `).FindAllSubmatch(page, -1)
	if len(knobs) < 20 {
		t.Fatalf("the page has %d knobs", len(knobs))
	}
	for _, m := range knobs {
		dir := filepath.Join("../../../..", string(m[1]))
		if string(m[1]) == "here" {
			dir = "."
		}
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Errorf("no package %s: %v", m[1], err)
		}
		var source strings.Builder
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") || filepath.Base(f) == "doc.go" {
				continue
			}
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			source.Write(b)
		}
		for name := range strings.SplitSeq(string(m[2]), ".") {
			if !regexp.MustCompile(`(?m)^(type |func (\([^)]*\) )?|const |var |\t(\w+, )*)` + name + `\b`).MatchString(source.String()) {
				t.Errorf("%s has no %s (%s)", m[1], name, m[2])
			}
		}
	}
}
