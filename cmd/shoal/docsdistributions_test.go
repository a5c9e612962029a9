package main

import (
	"regexp"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"go.yaml.in/yaml/v3"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/install"
)

// TestDocsDistributions: what the pages of distributions show can be read as what it is, and
// the documents for new machines are those that shoal install prints.
func TestDocsDistributions(t *testing.T) {
	blocks := regexp.MustCompile("(?s)```(toml|yaml)[^\n]*\n(.*?)```")
	c := config.DefaultNode()
	node := install.Node{Socket: c.Address, Root: c.Root, Mirror: c.MirrorAddress}
	shown := 0
	for _, page := range docPages(t) {
		name, ok := strings.CutPrefix(page, "distributions/")
		if !ok {
			continue
		}
		text := readDoc(t, page)
		for _, m := range blocks.FindAllStringSubmatch(text, -1) {
			shown++
			if m[1] == "toml" {
				checkTOML(t, page, m[2])
				continue
			}
			var v any
			if err := yaml.Unmarshal([]byte(m[2]), &v); err != nil {
				t.Errorf("%s: %v in\n%s", page, err, m[2])
			}
			eachString(v, func(s string) {
				if strings.Contains(s, "\n") {
					checkTOML(t, page, s)
				}
			})
		}
		for l := range strings.Lines(text) {
			if args, ok := strings.CutPrefix(strings.TrimSpace(l), "shoal install "); ok {
				if _, err := shoal(t, append(append([]string{"install"}, strings.Fields(args)...), "--help")...); err != nil {
					t.Errorf("%s: %s: %v", page, l, err)
				}
			}
		}
		h, err := install.Detect(t.TempDir(), strings.TrimSuffix(name, ".md"))
		if err != nil {
			t.Errorf("%s: %v", page, err)
		}
		if _, document, ok := strings.Cut(h.Snippet(node), ":\n"); ok && !strings.Contains(text, "```yaml\n"+document+"```") {
			t.Errorf("%s does not show\n%s", page, document)
		}
	}
	if shown < 9 {
		t.Errorf("%d blocks found", shown)
	}
}

func checkTOML(t *testing.T, page, text string) {
	t.Helper()
	if err := toml.Unmarshal([]byte(text), &map[string]any{}); err != nil {
		t.Errorf("%s: %v in\n%s", page, err, text)
	}
}

// eachString calls f for all strings in a value.
func eachString(v any, f func(string)) {
	switch v := v.(type) {
	case string:
		f(v)
	case []any:
		for _, e := range v {
			eachString(e, f)
		}
	case map[string]any:
		for _, e := range v {
			eachString(e, f)
		}
	}
}
