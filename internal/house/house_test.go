// Package house holds the tree to bounds that no linter knows.
//
// A file over 400 lines is a sign that it does two things. So is a type with many
// methods or fields, and splitting its file does not help. If a type passes a bound, then
// find the part of it that has invariants of its own, and give that part a type.
package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const (
	maxMethods = 45
	maxFields  = 31
)

// product is what is shipped, from the root of the module.
var product = []string{"blockdev", "cmd", "internal", "p2p", "snapshotter", "supernode"}

// sizes are numbers by name: of methods by type, and of fields by struct.
type sizes struct{ methods, fields map[string]int }

// count adds what a file declares. Names are those of package and type.
func (s sizes) count(pkg string, file *ast.File) {
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			if n.Recv != nil {
				s.methods[pkg+"."+receiver(n.Recv.List[0].Type)]++
			}
		case *ast.TypeSpec:
			if t, ok := n.Type.(*ast.StructType); ok {
				s.fields[pkg+"."+n.Name.Name] = t.Fields.NumFields()
			}
		}
		return true
	})
}

// receiver is the name of a method's type.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.IndexListExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return "?"
}

// files calls f with each file of the product that is not generated.
func files(t *testing.T, f func(pkg string, fset *token.FileSet, file *ast.File)) {
	t.Helper()
	const root = "../.."
	for _, dir := range product {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, path, nil, parser.ParseComments|parser.SkipObjectResolution)
			if err == nil && !ast.IsGenerated(file) {
				pkg, _ := filepath.Rel(root, filepath.Dir(path))
				f(pkg, fset, file)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// freeRelative is a word that docs/style.md has a noun for: callers that, nodes that.
var freeRelative = regexp.MustCompile(`\b(who|[Ww]hoever|[Ww]hom)\b|(^|[.:] )Who\b`)

// TestComments: comments say which caller or which machine they speak of.
func TestComments(t *testing.T) {
	comments := 0
	files(t, func(_ string, fset *token.FileSet, file *ast.File) {
		for _, group := range file.Comments {
			for _, c := range group.List {
				comments++
				if word := freeRelative.FindString(strings.TrimLeft(c.Text, "/ -")); word != "" {
					t.Errorf("%s: %q: name what it stands for, as in \"callers that\"", fset.Position(c.Pos()), word)
				}
			}
		}
	})
	if comments < 5000 {
		t.Errorf("%d comments are found: is this the tree?", comments)
	}
}

func TestTypes(t *testing.T) {
	s := sizes{map[string]int{}, map[string]int{}}
	files(t, func(pkg string, _ *token.FileSet, file *ast.File) { s.count(pkg, file) })
	if len(s.methods) < 100 || len(s.fields) < 100 {
		t.Fatalf("%d types with methods and %d structs are found: is this the tree?", len(s.methods), len(s.fields))
	}
	for name, n := range s.methods {
		if n > maxMethods {
			t.Errorf("%s has %d methods, at most %d are allowed", name, n, maxMethods)
		}
	}
	for name, n := range s.fields {
		if n > maxFields {
			t.Errorf("%s has %d fields, at most %d are allowed", name, n, maxFields)
		}
	}
}

func TestCount(t *testing.T) {
	const src = `package p
type S struct { a, b int; T; f func() }
type G[K comparable] struct{}
func (s *S) A() {}
func (S) B() {}
func (G[K]) C() {}
func F(s S) { type L struct { x int } }
`
	file, err := parser.ParseFile(token.NewFileSet(), "p.go", src, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := sizes{map[string]int{}, map[string]int{}}
	s.count("p", file)
	for name, want := range map[string]int{"p.S": 2, "p.G": 1, "p.T": 0} {
		if s.methods[name] != want {
			t.Errorf("%s has %d methods, want %d", name, s.methods[name], want)
		}
	}
	for name, want := range map[string]int{"p.S": 4, "p.G": 0, "p.L": 1} {
		if s.fields[name] != want {
			t.Errorf("%s has %d fields, want %d", name, s.fields[name], want)
		}
	}
}
