package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	changelogFile = "CHANGELOG.md"
	changelogHead = "# Changelog\n"
)

// Kinds of fragments, in the order in which operators want to read them.
var fragmentKinds = []struct{ prefix, title string }{
	{"security-", "Security"},
	{"change-", "Changes: read these before you upgrade"},
	{"feature-", "New"},
	{"fix-", "Fixed"},
}

// moveChangelog puts the fragments of changelog/unreleased into CHANGELOG.md, as the
// section of a version, and removes them.
func moveChangelog(root, version string, at time.Time) error {
	if !releaseTag.MatchString(version) {
		return fmt.Errorf("version %q: name the version that is to be released, as in `make changelog VERSION=v1.2.3`", version)
	}
	name := filepath.Join(root, changelogFile)
	old, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		old, err = []byte(changelogHead), nil
	}
	if err != nil {
		return err
	}
	rest, ok := strings.CutPrefix(string(old), changelogHead)
	if !ok {
		return fmt.Errorf("%s does not begin with %q", changelogFile, strings.TrimSpace(changelogHead))
	}
	if _, ok := changelogSection(rest, version); ok {
		return fmt.Errorf("%s has a section of %s already", changelogFile, version)
	}
	text, fragments, err := readFragments(filepath.Join(root, "changelog", "unreleased"))
	if err != nil {
		return err
	}
	section := fmt.Sprintf("\n## %s, %s\n%s", version, at.Format("2 January 2006"), text)
	if err := writeFile(name, func(w io.Writer) error {
		_, err := io.WriteString(w, changelogHead+section+rest)
		return err
	}); err != nil {
		return err
	}
	for _, f := range fragments {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	return nil
}

// readFragments returns a list for each kind, and the files.
func readFragments(dir string) (text string, files []string, err error) {
	all, err := filepath.Glob(filepath.Join(dir, "*.md"))
	if err != nil {
		return "", nil, err
	}
	if len(all) == 0 {
		return "", nil, fmt.Errorf("%s has no fragments: nothing has changed", dir)
	}
	for _, kind := range fragmentKinds {
		list := ""
		for _, f := range all {
			if !strings.HasPrefix(filepath.Base(f), kind.prefix) {
				continue
			}
			b, err := os.ReadFile(f)
			if err != nil {
				return "", nil, err
			}
			list += "- " + strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "\n  ") + "\n"
			files = append(files, f)
		}
		if list != "" {
			text += "\n### " + kind.title + "\n\n" + list
		}
	}
	if len(files) != len(all) {
		return "", nil, fmt.Errorf("%s: %d of %d fragments do not begin with their kind (changelog/README.md lists the kinds)", dir, len(all)-len(files), len(all))
	}
	return text, files, nil
}

// changelogSection finds what a changelog says of a version.
func changelogSection(changelog, version string) (string, bool) {
	_, after, ok := strings.Cut(changelog, "\n## "+version+", ")
	if !ok {
		return "", false
	}
	_, text, _ := strings.Cut(after, "\n")
	text, _, _ = strings.Cut(text, "\n## ")
	return strings.TrimSpace(text) + "\n", true
}
