package integration

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/integration/lab"
)

// flipSite is two nodes and a supernode; bits are flipped on the disk of the first
// node and of the supernode, and the second node gets everything from them.
type flipSite struct {
	*lab.Lab
	t          *testing.T
	super      *lab.Supernode
	one, other *lab.Node
	images     []flipImage // images[1] is fetched slowly, so that it is not complete
	mounts     int

	reads, failed      int
	wrong, native      []string
	checked, missed    int
	recovered, fromOne int
	said               map[string]int // findings of shoal check, by kind
}

type flipImage struct {
	*lab.Image
	files imageFiles
}

// flipKind is a kind of files to flip bits in.
type flipKind struct {
	name  string
	files string // pattern below the root of the node or supernode
	super bool
	// sure: whatever bit is flipped, shoal check finds it. In a database there are
	// bytes that mean nothing.
	sure bool
	// partly: of layers that are not all there.
	partly bool
	// native: the kernel reads these bytes by itself.
	native bool
	// records: the node's own, without which images have to be pulled again.
	records bool
}

func flipKinds() []flipKind {
	return []flipKind{
		{name: "diff", files: "diffs/*/data", sure: true, native: true},
		{name: "incomplete diff", files: "diffs/*/data", sure: true, partly: true},
		{name: "bitmap", files: "diffs/*/bitmap", sure: true},
		{name: "index", files: "diffs/*/index", sure: true},
		{name: "metadata image", files: "diffs/*/meta", sure: true},
		{name: "headers", files: "diffs/*/headers"},
		{name: "shoal.db", files: "shoal.db", records: true},
		{name: "metadata.db", files: "metadata.db", records: true},
		{name: "packs", files: "store/packs/*", super: true},
		{name: "index.db", files: "store/index.db", super: true},
		{name: "manifests", files: "manifests/*", super: true},
		{name: "profiles.db", files: "profiles.db", super: true},
		{name: "access.db", files: "access.db", super: true},
	}
}

// TestDrillFlips flips a bit on disk, in one kind of file after the other, on a node
// and on a supernode, while they are down. shoal check finds it, and so does whoever
// needs the bytes: a container gets the right ones, or an error, and another node
// never gets wrong ones. What containers read of a natively mounted layer is the
// kernel's; the scrub after the boot and shoal check find it, and that is counted.
func TestDrillFlips(t *testing.T) {
	f := newFlipSite(t)
	kinds := flipKinds()
	n := min(rounds(t, len(kinds)), 8*len(kinds))
	for i := range n {
		// Looked at before the next start, repaired then, or found by whoever reads.
		kind := kinds[i%len(kinds)]
		t.Logf("round %d: %s", i+1, kind.name)
		f.round(kind, i/len(kinds)+i%len(kinds))
	}
	for _, line := range slices.Concat(f.wrong, f.native) {
		t.Log(line)
	}
	name := fmt.Sprintf("a bit flipped on disk, %d rounds: ", n)
	t.Logf("%d files read, %d reads failed, %d flips looked for by shoal check (%d not found), findings %v; %d times images were pulled again after a database was damaged; the second node got %d bytes from the first",
		f.reads, f.failed, f.checked, f.missed, f.said, f.recovered, f.fromOne)
	count(t, name+"wrong bytes read or passed on", len(f.wrong))
	count(t, name+"flips in diffs, bitmaps, indexes that shoal check has not found", f.missed)
	figure(t, name+"failed reads", "", "", 0, float64(f.failed))
	figure(t, name+"wrong bytes that the kernel read from a native mount before the scrub", "", "", 0, float64(len(f.native)))
	noError(t, f.one.Stop())
	noError(t, f.super.Stop())
	bad := 0
	for _, root := range []string{f.one.Root, f.Path("super")} {
		// What shoal sets aside is the operator's to delete.
		for _, aside := range must(filepath.Glob(filepath.Join(root, "*.damaged")))(t) {
			noError(t, os.RemoveAll(aside))
		}
		if out, err := shoalCheck(t, f.Lab, root, "--repair"); err != nil {
			t.Logf("%v\n%s", err, out)
		}
		if out, err := shoalCheck(t, f.Lab, root); err != nil {
			t.Logf("%v\n%s", err, out)
			bad++
		}
	}
	count(t, name+"directories that shoal check --repair has not repaired", bad)
}

func newFlipSite(t *testing.T) *flipSite {
	ctx := t.Context()
	f := &flipSite{Lab: newLab(t), t: t, said: map[string]int{}}
	registry := must(f.StartRegistry(ctx, "registry", f.Path("images"), ""))(t)
	f.super = must(f.StartSupernode(ctx, "super", ""))(t)
	f.one = must(f.StartNode(ctx, "one", f.super.Address, "max_download = \"3MiB\"\n"))(t)
	f.other = must(f.StartNode(ctx, "other", f.super.Address, ""))(t)
	for i, size := range []int{200_000, 900_000} {
		files := imageFiles{}
		var layers []lab.Blob
		for l := range 2 {
			var entries []entry
			for e := range 3 {
				path := fmt.Sprintf("l%d-f%d", l, e)
				files[path] = content(uint64(7000+i*100+l*10+e), size)
				entries = append(entries, file(path, files[path]))
			}
			layers = append(layers, layer(t, entries...))
		}
		name := fmt.Sprintf("app%d", i)
		must(registry.Push(ctx, name, "v1", []string{"/bin/true"}, layers...))(t)
		f.images = append(f.images, flipImage{must(registry.Image(ctx, name, "v1"))(t), files})
	}
	for _, im := range f.images {
		noError(t, f.one.Pull(ctx, im.Image))
	}
	f.complete(f.images[0])
	return f
}

// complete has all bytes of an image brought to the first node.
func (f *flipSite) complete(im flipImage) {
	must(f.Run(f.t.Context(), "shoal", "prefetch", "--local", "--control", f.one.Control, im.Ref))(f.t)
}

// round flips one bit; how says what is done about it before the next start: 0
// nothing, 1 shoal check, 2 shoal check --repair.
func (f *flipSite) round(kind flipKind, how int) {
	ctx := f.t.Context()
	im := f.images[0]
	if kind.partly {
		im = f.images[1]
		noError(f.t, f.one.RemoveImage(ctx, im.Image))
		noError(f.t, f.one.Pull(ctx, im.Image))
		f.view(f.one, im, 1, nil, nil)
	} else {
		f.complete(im)
	}
	daemon, root := f.one.Process, f.one.Root
	if kind.super {
		daemon, root = f.super.Process, f.Path("super")
	}
	noError(f.t, daemon.Kill())
	where := f.flip(kind, im, root)
	if where == "" {
		f.t.Fatalf("%s: no bytes to flip", kind.name)
	}
	switch how % 3 {
	case 1:
		f.check(kind, where, "check", "--root", root, "--output", "json")
	case 2:
		f.check(kind, where, "check", "--repair", "--root", root, "--output", "json")
	}
	if kind.super {
		f.super = must(f.RestartSupernode(ctx, f.super))(f.t)
		// The first node is not to help.
		noError(f.t, f.one.RemoveImage(ctx, im.Image))
	} else {
		f.anotherBoot(root)
		f.one = must(f.RestartNode(ctx, f.one))(f.t)
	}
	f.passedOn(kind, im)
	if kind.super {
		noError(f.t, f.one.Pull(ctx, im.Image))
		f.complete(im)
	}
	f.readBack(kind, im)
}

// anotherBoot makes it look as if the machine had gone down, and not the process
// alone: what was written says during which boot (docs/formats.md).
func (f *flipSite) anotherBoot(root string) {
	noError(f.t, lab.DetachAll(filepath.Join(root, "m")))
	noError(f.t, os.WriteFile(filepath.Join(root, "open"), make([]byte, 16), 0o600))
	for _, path := range must(filepath.Glob(filepath.Join(root, "diffs", "*", "bitmap")))(f.t) {
		b := must(os.ReadFile(path))(f.t)
		const boot, sum = 80, 480
		if len(b) < sum+sha256.Size || sha256.Sum256(b[:sum]) != [sha256.Size]byte(b[sum:]) {
			continue // the bit that was flipped is here
		}
		clear(b[boot : boot+16])
		now := sha256.Sum256(b[:sum])
		copy(b[sum:], now[:])
		noError(f.t, os.WriteFile(path, b, 0o600))
	}
}

// passedOn has the second node get the image anew.
func (f *flipSite) passedOn(kind flipKind, im flipImage) {
	ctx := f.t.Context()
	noError(f.t, f.other.RemoveImage(ctx, im.Image))
	noError(f.t, lab.WaitFor(ctx, "pull by the second node", 30*time.Second, func() error { return f.other.Pull(ctx, im.Image) }))
	if !kind.super {
		// Half of the chunks come from the first node, once it is known.
		_ = lab.WaitFor(ctx, "", 5*time.Second, func() error {
			n, err := f.other.Metric(ctx, "shoal_node_peers")
			if err == nil && n == 0 {
				err = errors.New("none")
			}
			return err
		})
	}
	f.view(f.other, im, len(im.files), &f.wrong, &f.failed)
	if n, err := f.other.Metric(ctx, `shoal_node_received_bytes_total{source="peer",zone="same"}`); err == nil {
		f.fromOne = int(n)
	}
}

// readBack reads the image on the first node, and again when a check has been there.
func (f *flipSite) readBack(kind flipKind, im flipImage) {
	ctx := f.t.Context()
	if err := f.mountable(im, kind.records); err != nil {
		if !kind.records {
			f.t.Errorf("%s: %v", kind.name, err)
			f.failed++
			return
		}
		// The operator's part, as docs/troubleshooting.md has it: what was set aside, or is in
		// the way, is deleted, and images are pulled again.
		f.recovered++
		noError(f.t, f.one.Stop())
		for _, db := range []string{"metadata.db", "metadata.db.damaged", "shoal.db", "shoal.db.damaged"} {
			noError(f.t, os.RemoveAll(filepath.Join(f.one.Root, db)))
		}
		f.one = must(f.RestartNode(ctx, f.one))(f.t)
		for _, im := range f.images {
			noError(f.t, f.one.Pull(ctx, im.Image))
		}
	}
	first := &f.wrong
	if kind.native {
		first = &f.native
	}
	f.view(f.one, im, len(im.files), first, &f.failed)
	out, err := f.Run(ctx, "shoal", "check", "--repair", "--control", f.one.Control, "--output", "json")
	if err != nil && out == "" {
		f.t.Errorf("%s: %v", kind.name, err)
	}
	noError(f.t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0o200))
	f.view(f.one, im, len(im.files), &f.wrong, &f.failed)
	for _, db := range []string{"metadata.db.damaged", "shoal.db.damaged"} {
		noError(f.t, os.RemoveAll(filepath.Join(f.one.Root, db)))
	}
}

// mountable says whether the first node shows the image, pulled again if need be; and
// whether it can be removed, too, since nothing but that uses some of the records.
func (f *flipSite) mountable(im flipImage, records bool) error {
	return lab.WaitFor(f.t.Context(), "pull by the first node", 20*time.Second, func() error {
		if err := f.one.Pull(f.t.Context(), im.Image); err != nil {
			return err
		}
		f.mounts++
		dir := f.Path(fmt.Sprintf("try%d", f.mounts))
		unmount, err := f.one.Mount(f.t.Context(), im.Image, filepath.Base(dir), dir)
		if err != nil {
			return err
		}
		if err := unmount(); err != nil || !records {
			return err
		}
		if err := f.one.RemoveImage(f.t.Context(), im.Image); err != nil {
			return err
		}
		return f.one.Pull(f.t.Context(), im.Image)
	})
}

// view reads the first few files of an image on a node, and notes what is wrong and
// counts what fails, unless nil.
func (f *flipSite) view(n *lab.Node, im flipImage, files int, wrong *[]string, failed *int) {
	f.mounts++
	dir := f.Path(fmt.Sprintf("view%d", f.mounts))
	unmount, err := n.Mount(f.t.Context(), im.Image, filepath.Base(dir), dir)
	if err != nil {
		f.t.Errorf("mount of %s on %s: %v", im.Ref, n.Name, err)
		return
	}
	paths := make([]string, 0, len(im.files))
	for path := range im.files {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths[:files] {
		f.reads++
		got, err := os.ReadFile(filepath.Join(dir, path))
		switch {
		case wrong == nil:
		case err != nil:
			*failed++
			f.t.Logf("%s on %s: %v", path, n.Name, err)
		case string(got) != im.files[path]:
			*wrong = append(*wrong, fmt.Sprintf("%s of %s on %s: wrong bytes", path, im.Ref, n.Name))
		}
	}
	noError(f.t, unmount())
	noError(f.t, os.Remove(dir))
}

// flip flips a bit in one of a kind's files, and returns where.
func (f *flipSite) flip(kind flipKind, im flipImage, root string) string {
	files := must(filepath.Glob(filepath.Join(root, kind.files)))(f.t)
	files = slices.DeleteFunc(files, func(path string) bool {
		return strings.HasPrefix(kind.files, "diffs/") && !slices.ContainsFunc(im.Layers, func(l lab.Blob) bool {
			return strings.Contains(path, strings.TrimPrefix(l.DiffID, "sha256:"))
		})
	})
	rand.Shuffle(len(files), func(i, k int) { files[i], files[k] = files[k], files[i] })
	for _, path := range files {
		file := must(os.OpenFile(path, os.O_RDWR, 0))(f.t)
		off, ok := somewhere(f.t, file, kind.partly)
		for kind.name == "bitmap" && off >= 512 && off < 4096 { // means nothing
			off, ok = somewhere(f.t, file, kind.partly)
		}
		if ok {
			var b [1]byte
			_, err := file.ReadAt(b[:], off)
			noError(f.t, err)
			b[0] ^= 1 << rand.IntN(8)
			_, err = file.WriteAt(b[:], off)
			noError(f.t, err)
		}
		noError(f.t, errors.Join(file.Sync(), file.Close()))
		if ok {
			return fmt.Sprintf("%s, byte %d", path, off)
		}
	}
	return ""
}

// somewhere picks a byte of what a file has on disk: holes are nobody's, and neither is,
// in a file with holes to be filled, the rest of a block beside them.
func somewhere(t *testing.T, file *os.File, filling bool) (int64, bool) {
	const block = 4096
	size := must(file.Stat())(t).Size()
	var there [][2]int64
	var sum int64
	for at := int64(0); at < size; {
		from, err := unix.Seek(int(file.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		noError(t, err)
		to := must(unix.Seek(int(file.Fd()), from, unix.SEEK_HOLE))(t)
		at = to
		if filling {
			from, to = from+block, to-block
		}
		if from < to {
			there, sum = append(there, [2]int64{from, to}), sum+to-from
		}
	}
	if sum == 0 {
		return 0, false
	}
	n := rand.Int64N(sum)
	for _, r := range there {
		if n < r[1]-r[0] {
			return r[0] + n, true
		}
		n -= r[1] - r[0]
	}
	return 0, false
}

// check runs shoal check, which is to find what is wrong where.
func (f *flipSite) check(kind flipKind, where string, args ...string) {
	out, err := f.Run(f.t.Context(), "shoal", args...)
	var report struct {
		Findings []struct{ Where, Problem string }
	}
	if jerr := json.Unmarshal([]byte(out), &report); jerr != nil {
		f.t.Errorf("%s: shoal check: %v\n%s", where, err, out)
		return
	}
	if len(report.Findings) > 0 {
		f.said[kind.name]++
	} else if kind.sure {
		f.missed++
		f.t.Logf("%s: not found", where)
	}
	if kind.sure {
		f.checked++
	}
}
