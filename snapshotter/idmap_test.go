package snapshotter

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const mapping = "0:100000:65536"

func idmapped() snapshots.Opt {
	return snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: mapping, snapshots.LabelSnapshotGIDMapping: mapping,
	})
}

// erofsMount makes an EROFS image of a directory and mounts it from its file.
func erofsMount(t *testing.T, from string) string {
	t.Helper()
	mkfs, err := exec.LookPath("mkfs.erofs")
	if err != nil {
		t.Skip("needs mkfs.erofs")
	}
	dir := t.TempDir()
	img, mnt := filepath.Join(dir, "img"), filepath.Join(dir, "mnt")
	if out, err := exec.Command(mkfs, img, from).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, out)
	}
	check(t, os.Mkdir(mnt, 0o755))
	if err := unix.Mount(img, mnt, "erofs", unix.MS_RDONLY, ""); errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.ENODEV) {
		t.Skipf("kernel has no file-backed EROFS (Linux 6.12): %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, unix.Unmount(mnt, 0)) })
	return mnt
}

// Containers in user namespaces: files that root owns in the image belong to the
// container's root, in lazy layers that are EROFS mounts as in ordinary ones.
func TestIDMap(t *testing.T) {
	for _, mixed := range []bool{false, true} {
		n := newNode(t)
		ls := threeLayers(t)
		img := newImage("registry.test/app:1", ls...)
		n.images.publish(img)
		if mixed {
			n.images.err = errors.New("not now")
			_, _, err := n.pull(bg, newImage(img.ref, ls[0]))
			check(t, err)
			n.images.err = nil
		}
		top, _, err := n.pull(bg, img)
		check(t, err)
		for id, d := range n.data.dirs {
			n.data.dirs[id] = erofsMount(t, d)
		}
		mounts, err := n.Prepare(bg, "c", top, idmapped())
		if errdefs.IsFailedPrecondition(err) {
			t.Skipf("kernel: %v", err)
		}
		check(t, err)
		func() {
			root := mounted(t, mounts)
			checkThree(t, root)
			for _, name := range []string{".", "bin/sh", "etc/conf", "etc/new", "app/main"} {
				var st unix.Stat_t
				check(t, unix.Lstat(filepath.Join(root, name), &st))
				if st.Uid != 100000 || st.Gid != 100000 {
					t.Errorf("%s belongs to %d:%d, want the container's root", name, st.Uid, st.Gid)
				}
			}
		}()
		// Again, after the data path has mounted a diff anew.
		before := device(t, mounts, 0)
		must(n.Mounts(bg, "c"))(t)
		if device(t, mounts, 0) != before {
			t.Error("clones were made again for nothing")
		}
		last := ls[2].diffID
		n.data.dirs[last] = erofsMount(t, n.data.dirs[last])
		must(n.Mounts(bg, "c"))(t)
		if device(t, mounts, 0) == before {
			t.Error("the clone is of the old mount")
		}
		view := must(n.View(bg, "v", top, idmapped()))(t)
		checkThree(t, mounted(t, view))
		check(t, n.Remove(bg, "c"))
		check(t, n.Remove(bg, "v"))
		check(t, n.Cleanup(bg))
		for line := range strings.SplitSeq(read(t, "/proc/self/mountinfo"), "\n") {
			if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], n.root+"/") {
				t.Errorf("still mounted: %s", f[4])
			}
		}
		if left := must(os.ReadDir(n.scratch()))(t); len(left) != 0 {
			t.Errorf("left in scratch: %v", left)
		}
	}
}

// device of the i-th lower directory.
func device(t *testing.T, mounts []mount.Mount, i int) uint64 {
	t.Helper()
	var st unix.Stat_t
	for _, o := range mounts[0].Options {
		if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
			check(t, unix.Stat(strings.Split(v, ":")[i], &st))
		}
	}
	return st.Dev
}

func TestIDMapOfOneLayer(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/one:1", newLayer(t, file("hello")))
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	n.data.dirs[img.layers[0].diffID] = erofsMount(t, n.data.dirs[img.layers[0].diffID])
	for _, make := range []func() (string, error){
		func() (string, error) { m, err := n.View(bg, "v", top, idmapped()); return mounted(t, m), err },
		func() (string, error) { m, err := n.Prepare(bg, "c", top, idmapped()); return mounted(t, m), err },
	} {
		root := must(make())(t)
		var st unix.Stat_t
		check(t, unix.Lstat(filepath.Join(root, "hello"), &st))
		if st.Uid != 100000 {
			t.Errorf("hello belongs to %d", st.Uid)
		}
	}
	check(t, n.Remove(bg, "c"))
	check(t, n.Remove(bg, "v"))
	check(t, n.Cleanup(bg))
}

func TestMappedRoot(t *testing.T) {
	for in, want := range map[string]int{
		"0:100000:65536": 100000, "1:5:1,0:7:1": 7,
		"": -1, "0:1": -1, "0:x:1": -1, "0:-1:1": -1, "1:5:1": -1, "0:5:0": -1,
		"0:2914516992:65536": 2914516992, "0:4294967294:1": 4294967294, "0:4294967295:1": -1, "0:4294967296:1": -1,
	} {
		got, err := mappedRoot(in)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d, %v, want %d", in, got, err, want)
		}
	}
	n := newNode(t)
	bad := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: "0:0:1"})
	if _, err := n.Prepare(bg, "k", "", bad); !errdefs.IsInvalidArgument(err) {
		t.Errorf("uid mapping alone: %v", err)
	}
	if _, err := n.Stat(bg, "k"); !errdefs.IsNotFound(err) {
		t.Errorf("snapshot was made: %v", err)
	}
}

// TestIDMapOfOrdinary: images that were unpacked in the ordinary way are mapped by
// the snapshotter, too, since not every containerd knows how to.
func TestIDMapOfOrdinary(t *testing.T) {
	needRoot(t)
	n := newNode(t)
	img := newImage("registry.test/app:1", threeLayers(t)...)
	n.images.err = errors.New("not now")
	top, fetched, err := n.pull(bg, img)
	check(t, err)
	if len(fetched) != 3 {
		t.Fatalf("fetched %v, want all", fetched)
	}
	mounts := must(n.Prepare(bg, "c", top, idmapped()))(t)
	for _, o := range mounts[0].Options {
		if strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=") {
			t.Errorf("option %s is left to containerd", o)
		}
	}
	root := mounted(t, mounts)
	checkThree(t, root)
	belong(t, root, 100000, ".", "bin/sh", "etc/conf", "app/main")
	// Two ranges of one image at once, one of them above 2^31.
	const high = "0:2914516992:65536"
	other := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: high, snapshots.LabelSnapshotGIDMapping: high,
	})
	belong(t, mounted(t, must(n.Prepare(bg, "d", top, other))(t)), 2914516992, ".", "bin/sh")
	// A container of no image.
	bare := must(n.Prepare(bg, "e", "", idmapped()))(t)
	belong(t, mounted(t, bare), 100000, ".")
	for _, key := range []string{"c", "d", "e"} {
		check(t, n.Remove(bg, key))
	}
	check(t, n.Cleanup(bg))
	if left := must(os.ReadDir(n.scratch()))(t); len(left) != 0 {
		t.Errorf("left in scratch: %v", left)
	}
}

// belong checks the owner and group of files.
func belong(t *testing.T, root string, id uint32, names ...string) {
	t.Helper()
	for _, name := range names {
		var st unix.Stat_t
		check(t, unix.Lstat(filepath.Join(root, name), &st))
		if st.Uid != id || st.Gid != id {
			t.Errorf("%s belongs to %d:%d, want %d", name, st.Uid, st.Gid, id)
		}
	}
}

// TestIDMapOnce: where containerd has made a copy with other owners, since the proxy
// plugin lacks the capability "remap-ids", its files are not mapped again.
func TestIDMapOnce(t *testing.T) {
	needRoot(t)
	for _, lazy := range []bool{true, false} {
		n := newNode(t)
		img := newImage("registry.test/app:1", threeLayers(t)...)
		if lazy {
			n.images.publish(img)
		}
		top, _, err := n.pull(bg, img)
		check(t, err)
		// As containerd's client does: see resolveSnapshotOptions there.
		copied := mounted(t, must(n.Prepare(bg, "ns/5/sha256:copy-remap", top))(t))
		check(t, filepath.WalkDir(copied, func(p string, _ os.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(p, 100000, 100000))
		}))
		check(t, n.Commit(bg, "ns/6/sha256:copy", "ns/5/sha256:copy-remap"))
		root := mounted(t, must(n.Prepare(bg, "c", "ns/6/sha256:copy", idmapped()))(t))
		checkThree(t, root)
		belong(t, root, 100000, ".", "bin/sh", "etc/conf", "etc/new", "app/main")
		belong(t, mounted(t, must(n.View(bg, "v", "ns/6/sha256:copy", idmapped()))(t)), 100000, ".", "bin/sh")
		if got := n.log.lines("remap-ids"); len(got) != 1 {
			t.Errorf("the log says %d times how to avoid the copy:\n%s", len(got), n.log.b.String())
		}
	}
}
