package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
)

var (
	releaseTag = regexp.MustCompile(`^v(\d+\.\d+\.\d+)(?:-(rc\.\d+))?$`)
	describe   = regexp.MustCompile(`^v(\d+\.\d+\.\d+)(?:-rc\.\d+)?-(\d+-g[0-9a-f]+(?:-dirty)?)$`)
)

// checkRelease says why a commit cannot be released under its version.
func checkRelease(ctx context.Context, src *source) error {
	if !releaseTag.MatchString(src.Version) {
		return fmt.Errorf("version %q: a release is made from a commit with a tag such as v1.2.3 or v1.2.3-rc.1; `make release SNAPSHOT=1` tries it with any commit", src.Version)
	}
	tags, err := git(ctx, src.Root, "tag", "--points-at", "HEAD")
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(tags), src.Version) {
		return fmt.Errorf("the tag %s is not on the commit that is checked out, %s", src.Version, src.Revision)
	}
	if src.Dirty {
		return errors.New("the working tree differs from the commit (`git status` shows how): a release has what is in the commit alone")
	}
	_, err = releaseNotes(src)
	return err
}

// releaseNotes is what the changelog says of the version.
func releaseNotes(src *source) (string, error) {
	b, err := os.ReadFile(src.in(changelogFile))
	if err != nil {
		return "", err
	}
	notes, ok := changelogSection(string(b), src.Version)
	if !ok {
		return "", fmt.Errorf("%s has no section of %s: `make changelog VERSION=%s` makes it from the fragments; commit it before the tag", changelogFile, src.Version, src.Version)
	}
	return notes, nil
}

// fileVersion is the version in the names of files: without the v.
func fileVersion(version string) string {
	if describe.MatchString(version) || releaseTag.MatchString(version) {
		return strings.TrimPrefix(version, "v")
	}
	return "0.0.0-g" + version // without the g, Helm takes no commit of digits alone
}

// packageVersion is the version as dpkg and rpm sort it: candidates before their
// release, later commits after it, commits of a history without tags before all.
func packageVersion(version string) string {
	if m := releaseTag.FindStringSubmatch(version); m != nil {
		if m[2] != "" {
			return m[1] + "~" + m[2]
		}
		return m[1]
	}
	if m := describe.FindStringSubmatch(version); m != nil {
		return m[1] + "+" + strings.ReplaceAll(m[2], "-", ".")
	}
	return "0.0.0+" + strings.ReplaceAll(version, "-", ".")
}
