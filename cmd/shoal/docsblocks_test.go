package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"go.yaml.in/yaml/v3"
)

// block is what a page shows: a fenced block, or lines that are indented by four after an
// empty one and not in a list.
type block struct {
	at, language, text string
}

// drawings are pages whose blocks are drawings and lists of bytes.
var drawings = []string{"design.md", "formats.md"}

// pagesWithBlocks are all pages that users and developers read.
func pagesWithBlocks(t *testing.T) []string {
	t.Helper()
	pages, err := filepath.Glob(docs + "*.md")
	if err != nil || len(pages) < 15 {
		t.Fatalf("pages: %q, %v", pages, err)
	}
	return append(pages, docs+"../README.md", docs+"../CONTRIBUTING.md", docs+"../SECURITY.md")
}

// blocksOf returns the blocks of a page. An indented one is TOML if it begins with a table,
// else it is for a shell.
func blocksOf(t *testing.T, path string) (all []block) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	fence, inList := "", false
	var now *block
	end := func() {
		if now != nil {
			all = append(all, *now)
		}
		now = nil
	}
	for l := range strings.Lines(string(b)) {
		trimmed := strings.TrimSpace(l)
		indented := strings.HasPrefix(l, "    ")
		switch {
		case fence != "" && trimmed == fence:
			end()
			fence = ""
		case fence != "":
			now.text += l
		case strings.HasPrefix(trimmed, "```"):
			end()
			fence = "```"
			now = &block{at: filepath.Base(path), language: strings.TrimPrefix(trimmed, "```")}
		case now != nil && (indented || trimmed == ""):
			now.text += strings.TrimPrefix(l, "    ")
		case indented && !inList && !strings.HasPrefix(trimmed, "|"):
			now = &block{at: filepath.Base(path), language: "indented", text: strings.TrimPrefix(l, "    ")}
		default:
			end()
			switch {
			case strings.HasPrefix(l, "- "), regexp.MustCompile(`^[0-9]+\. `).MatchString(l):
				inList = true
			case trimmed != "" && !strings.HasPrefix(l, " "):
				inList = false
			}
		}
	}
	end()
	for i := range all {
		if all[i].language != "indented" {
			continue
		}
		all[i].language = "sh"
		for l := range strings.Lines(all[i].text) {
			if l = strings.TrimSpace(l); l != "" && l[0] != '#' {
				if l[0] == '[' {
					all[i].language = "toml"
				}
				break
			}
		}
	}
	return all
}

// TestDocsBlocks: what a page shows to be typed or written to a file can be: shells, TOML,
// YAML and JSON parse it, and the commands of shoal and the targets of make in it exist, with
// their flags.
func TestDocsBlocks(t *testing.T) {
	made, err := os.ReadFile(docs + "../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	shells, configs := 0, 0
	for _, page := range pagesWithBlocks(t) {
		for _, b := range blocksOf(t, page) {
			language, _, _ := strings.Cut(b.language, " ") // a role of shoal may follow
			var err error
			switch {
			case slices.Contains(drawings, b.at), language == "text":
			case language == "sh":
				shells++
				err = checkShell(t, b.text, string(made))
			case language == "toml":
				configs++
				err = toml.Unmarshal([]byte(b.text), new(map[string]any))
			case language == "yaml":
				configs++
				err = checkYAML(b.text)
			case language == "json":
				if !json.Valid([]byte(b.text)) {
					err = errors.New("no JSON")
				}
			default:
				err = errors.New("its language is not one that this test knows: sh, toml, yaml, json or text")
			}
			if err != nil {
				t.Errorf("%s: %v:\n%s", b.at, err, b.text)
			}
		}
	}
	if shells < 12 || configs < 6 {
		t.Errorf("%d blocks for a shell and %d configs found", shells, configs)
	}
}

func checkYAML(text string) error {
	for d := yaml.NewDecoder(strings.NewReader(text)); ; {
		if err := d.Decode(new(any)); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// separators are what stands between commands in a line.
var separators = regexp.MustCompile(`&&|[|;&]|\$\(`)

// checkShell has bash parse a block, and looks for its commands.
func checkShell(t *testing.T, text, makefile string) error {
	t.Helper()
	sh := exec.CommandContext(t.Context(), "bash", "-n")
	sh.Stdin = strings.NewReader(text)
	if out, err := sh.CombinedOutput(); err != nil {
		return errors.New(strings.TrimSpace(string(out)) + ": " + err.Error())
	}
	text = strings.ReplaceAll(text, "\\\n", " ")
	for l := range strings.Lines(text) {
		l, _, _ = strings.Cut(l, " #")
		for c := range strings.SplitSeq(separators.ReplaceAllString(l, "\n"), "\n") {
			words := strings.Fields(c)
			if len(words) > 0 && words[0] == "sudo" {
				words = words[1:]
			}
			if len(words) == 0 {
				continue
			}
			switch filepath.Base(words[0]) {
			case "shoal":
				if err := checkCommand(words[1:], true); err != nil {
					return err
				}
			case "make":
				for _, w := range words[1:] {
					if !strings.Contains(w, "=") && !strings.HasPrefix(w, "-") && !strings.Contains(makefile, "\n"+w+": ") && !strings.Contains(makefile, "\n"+w+":\n") {
						return errors.New("no target " + w)
					}
				}
			}
		}
	}
	return nil
}

// checkCommand looks for a command of shoal with these arguments; whole: they are all that it
// needs.
func checkCommand(args []string, whole bool) error {
	for i, a := range args {
		if strings.HasPrefix(a, ">") {
			args = args[:i]
			break
		}
	}
	cmd, rest, err := newCommand().Find(args)
	if err != nil {
		return err
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	rest = cmd.Flags().Args()
	if !cmd.Runnable() && len(rest) > 0 {
		return fmt.Errorf("%s has no command %s", cmd.Name(), rest[0])
	}
	if whole || len(rest) > 0 {
		return cmd.ValidateArgs(rest)
	}
	return nil
}

// TestDocsCommands: the commands of shoal that the text of a page names exist, with their
// flags. Words in capitals stand for arguments, and [] for what may be left out.
func TestDocsCommands(t *testing.T) {
	named := 0
	for _, page := range pagesWithBlocks(t) {
		if filepath.Base(page) == "formats.md" {
			continue // it quotes bytes
		}
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, code := range docCode.FindAllString(strings.Join(prose(string(b)), "\n"), -1) {
			words := strings.Fields(strings.NewReplacer("`", "", "[", "", "]", "", "...", "").Replace(code))
			if len(words) < 2 || words[0] != "shoal" {
				continue
			}
			named++
			if err := checkCommand(words[1:], false); err != nil {
				t.Errorf("%s: %s: %v", filepath.Base(page), code, err)
			}
		}
	}
	if named < 30 {
		t.Errorf("%d commands found", named)
	}
}

// TestCheckCommand: what does not exist is found.
func TestCheckCommand(t *testing.T) {
	for line, right := range map[string]bool{
		"status": true, "status --output json": true, "status --outptu json": false, "stauts": false, "status x": false,
		"prefetch": false, "prefetch IMAGE...": true, "store pin IMAGE": true, "store pni IMAGE": false, "config default node > FILE": true,
		"keep -- shoal node": true,
	} {
		if err := checkCommand(strings.Fields(line), true); (err == nil) != right {
			t.Errorf("%q: %v", line, err)
		}
	}
}
