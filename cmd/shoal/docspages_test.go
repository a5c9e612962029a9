package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// docWidth is docs/style.md's.
const docWidth = 100

var (
	docLink    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	docCode    = regexp.MustCompile("`[^`]*`")
	docHeading = regexp.MustCompile(`^#+ +(.*?) *$`)
	notInSlug  = regexp.MustCompile(`[^\p{L}\p{N}_\- ]`)
)

// prose returns the lines of a page, with "" in the place of those of fenced blocks, so
// that a line keeps its number.
func prose(page string) []string {
	lines := strings.Split(page, "\n")
	fenced := false
	for i, l := range lines {
		if strings.HasPrefix(strings.TrimSpace(l), "```") {
			fenced = !fenced
			lines[i] = ""
		} else if fenced {
			lines[i] = ""
		}
	}
	return lines
}

// headings returns what may follow the # in a link to a page, as GitHub makes it from the
// headings.
func headings(page string) map[string]bool {
	found := map[string]bool{"": true}
	for _, l := range prose(page) {
		m := docHeading.FindStringSubmatch(l)
		if m == nil {
			continue
		}
		slug := strings.ReplaceAll(notInSlug.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")
		found[slug] = true
	}
	return found
}

// TestDocsLinks: each relative link in a page names a file and a heading that exist, and
// the index has all pages.
func TestDocsLinks(t *testing.T) {
	root := filepath.Join(docs, "..")
	var pages []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md", "changelog/*.md", "changelog/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	if len(pages) < 15 {
		t.Fatalf("pages: %q", pages)
	}
	index := readDoc(t, "README.md")
	for _, p := range pages {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		if page, ok := strings.CutPrefix(p, filepath.Join(root, "docs")+"/"); ok && page != "README.md" && !strings.Contains(index, "]("+page+")") {
			t.Errorf("docs/README.md does not list %s", page)
		}
		for _, l := range prose(string(b)) {
			for _, m := range docLink.FindAllStringSubmatch(docCode.ReplaceAllString(l, "``"), -1) {
				if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
					continue
				}
				file, heading, _ := strings.Cut(m[1], "#")
				target := p
				if file != "" {
					target = filepath.Join(filepath.Dir(p), file)
				}
				if _, err := os.Stat(target); err != nil {
					t.Errorf("%s: link to %s: %v", p, m[1], err)
					continue
				}
				if heading == "" {
					continue
				}
				to, err := os.ReadFile(target)
				if err != nil || !headings(string(to))[heading] {
					t.Errorf("%s: link to %s: no such heading", p, m[1])
				}
			}
		}
	}
}

// docPages are all pages below docs/, named from there.
func docPages(t *testing.T) []string {
	t.Helper()
	pages, err := fs.Glob(os.DirFS(docs), "*.md")
	below, err2 := fs.Glob(os.DirFS(docs), "*/*.md")
	if pages = append(pages, below...); err != nil || err2 != nil || len(pages) < 20 {
		t.Fatalf("pages: %q, %v, %v", pages, err, err2)
	}
	return pages
}

// TestDocsWidth: prose in docs/ ends at column docWidth. Tables, code and single words may
// be wider.
func TestDocsWidth(t *testing.T) {
	for _, p := range docPages(t) {
		for i, l := range prose(readDoc(t, p)) {
			code, wide := strings.HasPrefix(l, "    "), len([]rune(l)) > docWidth
			if wide && !code && !strings.HasPrefix(strings.TrimSpace(l), "|") && strings.Contains(strings.TrimSpace(l), " ") {
				t.Errorf("%s:%d: a line of %d characters, and %d are the most:\n%s", p, i+1, len([]rune(l)), docWidth, l)
			}
		}
	}
}

// composed are lines of the log that the program puts together: volume's queues have a
// name each.
var composed = []string{"prefetch failed", "proof failed"}

// TestDocsLogLines: the lines of the log that the page for troubleshooting explains are
// lines of the program.
func TestDocsLogLines(t *testing.T) {
	_, lines, ok := strings.Cut(readDoc(t, "troubleshooting.md"), "\n## Lines in the log\n")
	if !ok {
		t.Fatal("no section about lines in the log")
	}
	source := goSource(t)
	explained := 0
	for l := range strings.Lines(lines) {
		first, _, ok := strings.Cut(l, " | ")
		if !ok || !strings.HasPrefix(first, "| `") {
			continue
		}
		for _, m := range docCode.FindAllString(first, -1) {
			explained++
			line := strings.TrimSpace(strings.TrimSuffix(strings.Trim(m, "`"), "..."))
			if !slices.Contains(composed, line) && !strings.Contains(source, `"`+line) {
				t.Errorf("no line of the log begins like this any more: %s", line)
			}
		}
	}
	if explained < 50 {
		t.Errorf("%d lines found", explained)
	}
}

// goSource returns the program's Go files in one string, with literals that are in several
// parts put together.
func goSource(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, dir := range []string{"blockdev", "cmd", "internal", "p2p", "snapshotter", "supernode"} {
		err := filepath.WalkDir(filepath.Join(docs, "..", dir), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			b, err := os.ReadFile(path)
			all.Write(b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return regexp.MustCompile(`"\s*\+\s*"`).ReplaceAllString(all.String(), "")
}
