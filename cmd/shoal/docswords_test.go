package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// banned is one row of the table in docs/style.md: a phrase that does not occur, but for
// longer phrases that contain it and are right.
type banned struct {
	phrase string
	in     *regexp.Regexp
	right  *regexp.Regexp // nil if there are none
}

// found returns the first place where a text has the phrase, with what is around it, or
// "". Case and line breaks do not count.
func (b banned) found(text string) string {
	if b.right != nil {
		text = b.right.ReplaceAllString(text, "")
	}
	at := b.in.FindStringIndex(text)
	if at == nil {
		return ""
	}
	return text[max(0, at[0]-60):min(len(text), at[1]+60)]
}

func phrase(words ...string) *regexp.Regexp {
	for i, w := range words {
		words[i] = strings.Join(strings.Fields(regexp.QuoteMeta(w)), `\s+`)
	}
	return regexp.MustCompile(`(?i)\b(?:` + strings.Join(words, "|") + `)\b`)
}

// bannedWords reads the table.
func bannedWords(t *testing.T) []banned {
	t.Helper()
	_, rest, ok := strings.Cut(readDoc(t, "style.md"), "<!-- words that do not occur -->\n")
	table, _, ok2 := strings.Cut(rest, "<!-- end of words that do not occur -->")
	if !ok || !ok2 {
		t.Fatal("style.md has no table of words that do not occur")
	}
	var all []banned
	for l := range strings.Lines(table) {
		first, _, _ := strings.Cut(strings.TrimPrefix(l, "|"), "|")
		code := docCode.FindAllString(first, -1)
		if code == nil {
			continue // head and rule
		}
		for i, c := range code {
			code[i] = strings.Trim(c, "`")
		}
		b := banned{phrase: code[0], in: phrase(code[0])}
		if len(code) > 1 {
			b.right = phrase(code[1:]...)
		}
		all = append(all, b)
	}
	if len(all) < 30 {
		t.Fatalf("%d words in style.md's table", len(all))
	}
	return all
}

// TestDocsWords: what the program says has none of the words that docs/style.md rules out,
// nor do the pages. Every text in the source counts, whichever function it is for: a log
// message, an error, the help of a metric or a command, the comment of a key.
func TestDocsWords(t *testing.T) {
	words := bannedWords(t)
	check := func(where, text string) {
		for _, b := range words {
			if at := b.found(text); at != "" {
				t.Errorf("%s: %q is one of the words that docs/style.md rules out:\n... %s ...", where, b.phrase, at)
			}
		}
	}
	texts := 0
	for _, dir := range []string{"blockdev", "cmd", "internal", "p2p", "snapshotter", "supernode"} {
		err := filepath.WalkDir(filepath.Join(docs, "..", dir), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
				return err
			}
			return eachText(path, func(at token.Position, text string) {
				texts++
				check(at.String(), text)
			})
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if texts < 1500 {
		t.Errorf("%d texts found", texts)
	}
	for _, p := range append(docPages(t), "../README.md") {
		if slices.Contains(exempt, filepath.Base(p)) {
			continue
		}
		for par := range strings.SplitSeq(docCode.ReplaceAllString(strings.Join(prose(readDoc(t, p)), "\n"), ""), "\n\n") {
			check(p, par)
		}
	}
}

// exempt are the pages that TestDocsWords leaves out: the one that lists the words, the one
// whose rows are named as they were measured, and the one with a message called who.
var exempt = []string{"style.md", "benchmarks.md", "formats.md"}

// eachText calls f with each text of more than one word in a Go file. Texts in several
// parts are put together; of a struct's tag, the comment counts.
func eachText(path string, f func(at token.Position, text string)) error {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, path, nil, 0)
	if err != nil {
		return err
	}
	tags := map[ast.Expr]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		if field, ok := n.(*ast.Field); ok && field.Tag != nil {
			tags[field.Tag] = true
		}
		e, ok := n.(ast.Expr)
		if !ok {
			return true
		}
		text, ok := literal(e)
		if !ok {
			return true
		}
		if tags[e] {
			text = reflect.StructTag(text).Get("comment")
		}
		if strings.Contains(text, " ") {
			f(fset.Position(e.Pos()), text)
		}
		return false
	})
	return nil
}

// literal returns the text of a literal or a sum of them. What is not a literal counts as
// a word.
func literal(e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind != token.STRING {
			return "", false
		}
		s, err := strconv.Unquote(e.Value)
		return s, err == nil
	case *ast.BinaryExpr:
		if e.Op != token.ADD {
			return "", false
		}
		x, isX := literal(e.X)
		y, isY := literal(e.Y)
		if !isX {
			x = "..."
		}
		if !isY {
			y = "..."
		}
		return x + y, isX || isY
	}
	return "", false
}

// TestBanned: phrases are found across case and line breaks, as words, and not within a
// phrase that is right.
func TestBanned(t *testing.T) {
	b := banned{phrase: "is no", in: phrase("is no"), right: phrase("there is no", "is no longer")}
	for text, want := range map[string]bool{
		"this is no file": true, "This Is\nno file": true, "there is no file": false, "it is no longer here": false,
		"this nor that": false, "this is not it": false, "there is no file that is no image": true,
	} {
		if (b.found(text) != "") != want {
			t.Errorf("%q: found: %v", text, !want)
		}
	}
}
