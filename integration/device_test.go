package integration

import (
	"fmt"
	"strings"
	"testing"
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
