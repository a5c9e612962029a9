package integration

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestExport: layers of a lazy image are not in containerd's content store, so it cannot
// be exported, converted or pushed, until the command of docs/limits.md has
// brought them there; the image stays lazy.
func TestExport(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	ref := s.push(t, "app", toolsLayer(t, "sh", "cat"), layer(t, file("data", bigContent(1))))
	noError(t, s.Pull(ctx, "shoal", ref))
	out := s.Path("out.tar")
	commands := [][]string{
		{"images", "export", out, ref},
		{"images", "convert", "--oci", "--uncompress", ref, "converted:1"},
		{"images", "push", "--plain-http", s.registry.Addr + "/copy:v1", ref},
	}
	for _, c := range commands[:2] {
		if _, err := s.Ctr(ctx, c...); err == nil || !strings.Contains(err.Error(), "not found") {
			t.Errorf("ctr %s of a lazy image: %v; do the documented limits still hold?", strings.Join(c, " "), err)
		}
	}
	_, err := s.Ctr(ctx, "content", "fetch", ref)
	noError(t, err)
	for _, c := range commands {
		if _, err := s.Ctr(ctx, c...); err != nil {
			t.Errorf("ctr %s: %v", strings.Join(c, " "), err)
		}
	}
	if !s.isLazy(t, ctx, ref) {
		t.Error("the image is not lazy any more")
	}
	if got, err := s.sh(t, "shoal", ref, "cat /data"); err != nil || got != bigContent(1) {
		t.Errorf("it does not run: %v", err)
	}
}

// TestDiff: the difference between a container of a lazy image and the image is what
// has changed, and nothing else.
func TestDiff(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	ref := s.push(t, "app", toolsLayer(t, "sh", "rm", "sleep"), layer(t, dir("d/"), file("d/old", "old"), file("d/kept", bigContent(1))))
	noError(t, s.Pull(ctx, "shoal", ref))
	c := must(s.StartContainer(ctx, "c", "shoal", ref, "/bin/sh", "-c", "echo new > /d/new; rm /d/old; exec sleep 1000"))(t)
	var names []string
	for range 100 {
		diff, err := exec.CommandContext(ctx, s.Bin+"/ctr", "--address", s.Address, "snapshots", "--snapshotter", "shoal", "diff",
			"--media-type", "application/vnd.oci.image.layer.v1.tar", c.ID()).Output()
		noError(t, err)
		names = nil
		for r := tar.NewReader(bytes.NewReader(diff)); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			noError(t, err)
			names = append(names, h.Name)
		}
		if slices.Contains(names, "d/.wh.old") {
			break // the script has got there
		}
	}
	want := []string{"d/", "d/.wh.old", "d/new"}
	slices.Sort(names)
	if got := slices.DeleteFunc(names, func(n string) bool { return !strings.HasPrefix(n, "d/") }); !slices.Equal(got, want) {
		t.Errorf("the difference has %q below d, want %q", got, want)
	}
}
