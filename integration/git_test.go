package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// git runs git in a directory and returns what it prints.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", append([]string{
		"-C", dir, "-c", "safe.directory=*", "-c", "user.name=lab", "-c", "user.email=lab@lab.test", "-c", "init.defaultBranch=main",
	}, args...)...)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "HOME=/nonexistent")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestGitIndex: a git work tree in an image stays clean, by what its index remembers
// of each file (inode number, times), when the kernel has dropped what it knows of the
// files, and when the container, and the node, have been restarted.
func TestGitIndex(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	work := t.TempDir()
	for i := range 60 {
		d := filepath.Join(work, fmt.Sprintf("d%d", i))
		noError(t, os.MkdirAll(filepath.Join(d, "deep"), 0o755))
		noError(t, os.WriteFile(filepath.Join(d, "deep", "f"), []byte(content(uint64(i), 3000)), 0o644))
	}
	git(t, work, "init", "-q")
	git(t, work, "add", ".")
	git(t, work, "commit", "-q", "-m", "all")
	tree := []entry{dir("repo/")}
	noError(t, filepath.WalkDir(work, func(path string, d os.DirEntry, err error) error {
		name, rerr := filepath.Rel(work, path)
		if err != nil || rerr != nil || name == "." {
			return err
		}
		if d.IsDir() {
			tree = append(tree, dir("repo/"+name+"/"))
			return nil
		}
		b, err := os.ReadFile(path)
		tree = append(tree, file("repo/"+name, string(b)))
		return err
	}))
	ref := s.push(t, "repo", layer(t, tree...))
	for _, snapshotter := range []string{"overlayfs", "shoal"} {
		noError(t, s.Pull(ctx, snapshotter, ref))
		at := must(os.MkdirTemp(s.Dir, "rw"))(t)
		must(s.Ctr(ctx, "images", "mount", "--rw", "--snapshotter", snapshotter, ref, at))(t)
		repo := filepath.Join(at, "repo")
		clean := func(after string) {
			t.Helper()
			noError(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0o200))
			// It compares with the index, and does not look into files whose entries differ.
			if out := git(t, repo, "diff-files"); out != "" {
				t.Errorf("%s: %s: %d files look changed, such as %s", snapshotter, after, strings.Count(out, "\n"), strings.SplitN(out, "\n", 2)[0])
			}
		}
		git(t, repo, "update-index", "-q", "--refresh")
		clean("after the caches were dropped")
		must(s.Ctr(ctx, "images", "unmount", at))(t)
		if snapshotter == "shoal" {
			noError(t, s.node.Stop())
			s.node = must(s.RestartNode(ctx, s.node))(t)
		}
		// The same snapshot again; it is called as the directory.
		command := must(s.Ctr(ctx, "snapshots", "--snapshotter", snapshotter, "mounts", at, at))(t)
		if out, err := exec.CommandContext(ctx, "sh", "-c", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
		clean("after a restart")
		if out := git(t, repo, "status", "--porcelain"); out != "" {
			t.Errorf("%s: git status: %s", snapshotter, out)
		}
		noError(t, os.WriteFile(filepath.Join(repo, "d7", "deep", "f"), []byte("changed"), 0o644))
		if out := git(t, repo, "status", "--porcelain"); out != " M d7/deep/f\n" {
			t.Errorf("%s: git status of a changed file: %q", snapshotter, out)
		}
		must(s.Ctr(ctx, "images", "unmount", "--rm", "--snapshotter", snapshotter, at))(t)
	}
}
