package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// docStep is a step of a walk, docStop a file and a function in it.
var (
	docStep = regexp.MustCompile(`^\d+\. `)
	docStop = regexp.MustCompile("`([a-z0-9/_]+\\.go)`(?:\\s+`([A-Za-z.]+)`)?")
)

// TestDocsWalks: the walks of design.md have at most twelve steps, each step names a
// file and a function, and all that they name exist.
func TestDocsWalks(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(docs, "design.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, walks, ok := strings.Cut(string(page), "\n## 9. Three walks through the code\n")
	if !ok {
		t.Fatal("design.md has no section of walks")
	}
	walks, _, _ = strings.Cut(walks, "\n## ")
	all := strings.Split(walks, "\n### ")[1:]
	if len(all) != 3 {
		t.Fatalf("%d walks", len(all))
	}
	for _, walk := range all {
		title, text, _ := strings.Cut(walk, "\n")
		var steps []string
		for line := range strings.Lines(text) {
			switch {
			case docStep.MatchString(line):
				steps = append(steps, line)
			case len(steps) > 0:
				steps[len(steps)-1] += line
			}
		}
		if len(steps) < 3 || len(steps) > 12 {
			t.Errorf("%s: %d steps", title, len(steps))
		}
		for _, step := range steps {
			stops := docStop.FindAllStringSubmatch(step, -1)
			if len(stops) == 0 || stops[0][2] == "" {
				t.Errorf("%s: no file and function in %q", title, step)
			}
			for _, stop := range stops {
				funcs, err := funcsIn(filepath.Join(docs, "..", stop[1]))
				if err != nil {
					t.Errorf("%s: %v", title, err)
				} else if stop[2] != "" && !funcs[stop[2]] {
					t.Errorf("%s: no %s in %s", title, stop[2], stop[1])
				}
			}
		}
	}
}

// funcsIn returns the functions that a file declares: Name, or Type.Name for methods.
func funcsIn(file string) (map[string]bool, error) {
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		name := fn.Name.Name
		if fn.Recv != nil {
			recv := fn.Recv.List[0].Type
			if p, ok := recv.(*ast.StarExpr); ok {
				recv = p.X
			}
			if g, ok := recv.(*ast.IndexExpr); ok {
				recv = g.X
			}
			id, ok := recv.(*ast.Ident)
			if !ok {
				continue
			}
			name = id.Name + "." + name
		}
		found[name] = true
	}
	return found, nil
}
