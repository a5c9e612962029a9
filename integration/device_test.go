package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestOneFileSystem: programs that stay on one file system, or remember directories by
// their inode numbers, find in a lazy image what they find in one that overlayfs
// has unpacked.
func TestOneFileSystem(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	tree := []entry{dir("t/")}
	for i := range 200 {
		tree = append(tree, dir(fmt.Sprintf("t/%d/", i)), file(fmt.Sprintf("t/%d/f", i), strings.Repeat("x", 5000)))
	}
	ref := s.push(t, "tree", toolsLayer(t, "sh", "stat", "du", "find", "tar", "wc", "cat"), layer(t, tree...), layer(t, file("t/top", "top")))
	for _, snapshotter := range []string{"overlayfs", "shoal"} {
		noError(t, s.Pull(ctx, snapshotter, ref))
	}
	// What is new is in the upper layer, beside what is not.
	const script = `mkdir -p /t/new/deep; echo x > /t/new/f
echo devices $(find /t -exec stat -c %d {} + | while read d; do echo $d; done | (n=; c=0; while read d; do case " $n " in *" $d "*) ;; *) n="$n $d"; c=$((c+1));; esac; done; echo $c))
echo find $(find / -xdev -path /proc -prune -o -type f -print | wc -l)
echo du $(if [ "$(du -sxk /t)" = "$(du -sk /t)" ]; then echo same; else du -sxk /t; du -sk /t; fi)
echo tar $(tar --one-file-system -C / -cf - t | wc -c)
stat -c '%i %n' /t /t/0 /t/1 /t/0/f /t/new > /before
echo 2 > /host/drop_caches
stat -c '%i %n' /t /t/0 /t/1 /t/0/f /t/new > /after
cat /after >&2
while read a <&3 && read b <&4; do [ "$a" = "$b" ] || echo moved $a to $b; done 3</before 4</after
stat -c %i /t/1/f > /before; echo more >> /t/1/f; stat -c %i /t/1/f > /after
read a < /before; read b < /after; echo kept $([ $a = $b ] && echo yes)`
	drop := "type=bind,src=/proc/sys/vm/drop_caches,dst=/host/drop_caches,options=bind:rw"
	var said []string
	for _, snapshotter := range []string{"overlayfs", "shoal"} {
		out, err := s.sh(t, snapshotter, ref, script, "--mount", drop)
		noError(t, err)
		t.Logf("%s:\n%s", snapshotter, out)
		said = append(said, out)
	}
	if said[0] != said[1] {
		t.Errorf("overlayfs:\n%s\nshoal:\n%s", said[0], said[1])
	}
	if !strings.Contains(said[1], "devices 1\n") || strings.Contains(said[1], "moved") {
		t.Errorf("%s", said[1])
	}
}

// TestTimes: a file of a lazy image has the time of its last change as that of its last
// reading and of its last change of attributes; modification times are the image's.
func TestTimes(t *testing.T) {
	s := newSite(t, "")
	ref := s.push(t, "app", toolsLayer(t, "sh", "stat", "cat"), layer(t, file("data", "data"), file("implied/f", "")))
	noError(t, s.Pull(t.Context(), "shoal", ref))
	want := fmt.Sprintf("%[1]d %[1]d %[1]d\n0", mtime.Unix())
	if got, err := s.sh(t, "shoal", ref, "cat /data >&2; stat -c '%X %Y %Z' /data; stat -c %Y /implied"); err != nil || strings.TrimSpace(got) != want {
		t.Errorf("times of access, modification and change are %q, want %q (%v); do the documented limits still hold?", got, want, err)
	}
}

// TestDirectIO: with mount = "loop", programs in containers may use O_DIRECT on files of a
// lazy image, those that are not here yet as well; without, they may not.
func TestDirectIO(t *testing.T) {
	for _, way := range []string{"file", "loop"} {
		s := newSite(t, fmt.Sprintf("mount = %q\n", way))
		ref := s.push(t, "app", toolsLayer(t, "sh", "dd", "cmp"), layer(t, file("data", bigContent(1))))
		noError(t, s.Pull(t.Context(), "shoal", ref))
		out, err := s.sh(t, "shoal", ref, "dd if=/data of=/copy iflag=direct bs=64k 2>&1; if cmp /data /copy; then echo same; fi")
		noError(t, err)
		if direct := strings.Contains(out, "same"); direct != (way == "loop") {
			t.Errorf("mount = %q: direct I/O is %t; do the documented limits still hold?\n%s", way, direct, out)
		}
	}
}

// TestPinnedMounts: a mount namespace that has copied the node's mounts, as that of a pod
// which has / of the machine in it, keeps neither the mounts nor the bytes of an
// image that is removed.
func TestPinnedMounts(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, dir("d/"), file("d/data", bigContent(1))))
	noError(t, s.Pull(ctx, "shoal", ref))
	must(s.node.Status(ctx))(t)
	agent := must(s.Start("agent", "unshare", nil, "--mount", "--propagation", "private", "sleep", "1000"))(t)
	pinned := func() (n int) {
		b := must(os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", agent.Pid())))(t)
		return strings.Count(string(b), s.node.Root+"/m/")
	}
	noError(t, lab.WaitFor(ctx, "the agent's copy of the mounts", 10*time.Second, func() error {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", agent.Pid()))
		if err == nil && !strings.HasSuffix(exe, "sleep") {
			err = fmt.Errorf("it runs %s", exe)
		}
		return err
	}))
	if pinned() == 0 {
		t.Fatal("the agent has no copy of the mounts")
	}
	must(s.Ctr(ctx, "images", "rm", "--sync", ref))(t)
	noError(t, lab.WaitFor(ctx, "mounts and bytes gone", 20*time.Second, func() error {
		left, err := filepath.Glob(filepath.Join(s.node.Root, "diffs", "*"))
		if err != nil {
			return err
		}
		if n := pinned(); n > 0 || len(left) > 0 {
			return fmt.Errorf("%d mounts in the agent's namespace, files %v", n, left)
		}
		return nil
	}))
}
