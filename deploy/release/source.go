package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// What all descriptions of shoal say.
const (
	projectURL  = "https://github.com/shoalfs/shoal"
	license     = "Apache-2.0"
	summary     = "Starts containers before their image is there"
	description = "A containerd snapshotter that starts containers before their image is there, with a cache per datacenter and peer-to-peer distribution."
)

// source is the commit that everything is made from.
type source struct {
	Root     string    // top of the repository
	Version  string    // as the programs print it
	Revision string    // the commit, 40 hex digits
	Time     time.Time // of the commit, in UTC: the only time in what is made
	Dirty    bool      // files differ from the commit, or are not in it
}

// readSource looks at the repository that the working directory is in.
func readSource(ctx context.Context, version string) (*source, error) {
	if version == "" {
		return nil, errors.New("no version is given: name one with --version, as make does")
	}
	root, err := git(ctx, ".", "rev-parse", "--show-toplevel")
	if err != nil {
		return nil, err
	}
	s := &source{Root: root, Version: version}
	if s.Revision, err = git(ctx, root, "rev-parse", "HEAD"); err != nil {
		return nil, err
	}
	seconds, err := git(ctx, root, "show", "--no-patch", "--format=%ct", "HEAD")
	if err != nil {
		return nil, err
	}
	unix, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("time of commit %s: %w", s.Revision, err)
	}
	s.Time = time.Unix(unix, 0).UTC()
	changed, err := git(ctx, root, "status", "--porcelain")
	if err != nil {
		return nil, err
	}
	s.Dirty = changed != ""
	return s, nil
}

// in is a path from the top of the repository.
func (s *source) in(elem ...string) string {
	if filepath.IsAbs(elem[0]) {
		return filepath.Join(elem...)
	}
	return filepath.Join(append([]string{s.Root}, elem...)...)
}

// git returns what git prints, without the space around it.
func git(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(out)), nil
}
