package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/shoalfs/shoal/integration/lab"
)

// killSite is a kept site whose node and supernode are killed while they are at one
// thing, and looked through for what that has left behind.
type killSite struct {
	*keptSite
	t      *testing.T
	calls  snapshots.Snapshotter // through containerd
	parent string                // a snapshot of the image that is always there
	serial int

	unexplained, late, readFiles int
	wrong                        []string
	left                         []string
}

// killPoint is one thing to be killed at.
type killPoint struct {
	name string
	// prepare makes ready, and returns what is to be under way when the kill comes;
	// it may end before. And then what makes sure that it can be done again, that
	// what it made is right, and takes it away.
	prepare func() (do func(context.Context) error, after func())
	within  time.Duration // the kill comes after this time at the latest
	super   bool          // the supernode is killed, and not the node
}

// TestDrillKillPoints kills the node while containerd makes, commits and removes
// snapshots, pulls and removes images, during prefetch and eviction; and the
// supernode during ingest and eviction. Whatever was cut off can be done again, and
// nothing is left behind: no mount, no file, and, when the last image is gone, no
// descriptor and no goroutine.
func TestDrillKillPoints(t *testing.T) {
	k := newKillSite(t)
	ctx := t.Context()
	k.cycle("warm") // what the first image alone brings with it
	k.settled("after the first image", nil)
	files, procs := k.files(), k.processes()

	base := k.image("base", 1<<20)
	noError(t, k.Pull(ctx, "shoal", base.ref))
	for _, info := range k.snapshots() {
		if info.Kind == snapshots.KindCommitted && info.Parent != "" {
			k.parent = info.Name
		}
	}
	points := k.points()
	n := min(rounds(t, len(points)), 8*len(points))
	k.cycle("again") // so that base is all there is, and complete
	noError(t, k.prefetch(ctx, "--local", k.node.Control, base.ref))
	before := k.files()
	for i := range n {
		p := &points[i%len(points)]
		do, after := p.prepare()
		began, ended := time.Now(), make(chan error, 1)
		var took time.Duration
		go func() {
			err := do(ctx)
			took = time.Since(began)
			ended <- err
		}()
		wait(ctx, rand.N(p.within))
		if len(ended) > 0 {
			k.late++
			p.within = took // so that the next one is not
		}
		if p.super {
			noError(t, k.supernode.Kill())
			k.supernode = must(k.RestartSupernode(ctx, k.supernode))(t)
		} else {
			must(k.node.KillNode(ctx))(t)
		}
		k.explained(p.name, <-ended)
		after()
		k.settled(fmt.Sprintf("round %d, %s", i, p.name), before)
	}
	k.remove(base.ref)
	for range 3 { // in the processes as they are now
		k.cycle("last")
	}
	k.settled("at the end", files)
	grown := k.grown(procs)
	for _, s := range slices.Concat(k.wrong, k.left, grown) {
		t.Log(s)
	}
	t.Logf("%d kills, %d of them after what they were to hit; %d files read back", n, k.late, k.readFiles)
	name := fmt.Sprintf("kill -9 during prepare, commit, remove, pull, prefetch, ingest, eviction, %d rounds: ", n)
	count(t, name+"calls that failed and did not say why, or failed again", k.unexplained)
	count(t, name+"wrong or unreadable files", len(k.wrong))
	count(t, name+"mounts, directories and files left", len(k.left))
	count(t, name+"descriptors and goroutines left", len(grown))
	noError(t, k.node.Stop())
	noError(t, k.supernode.Stop())
	damaged := 0
	for _, root := range []string{k.node.Root, k.Path("super")} {
		if out, err := shoalCheck(t, k.Lab, root); err != nil {
			damaged++
			t.Logf("%v\n%s", err, out)
		}
	}
	count(t, name+"directories in which shoal check finds something", damaged)
}

func newKillSite(t *testing.T) *killSite {
	ctx := t.Context()
	s := &keptSite{site: &site{Lab: newLab(t)}}
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	// Less than the quotas; the supernode leaves 32 alone, the node a sixteenth.
	smallDisk(t, s.Path("super"), 112)
	smallDisk(t, s.Path("node", "r"), 40)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	s.node = must(s.StartKeptNode(ctx, "node", s.supernode.Address, ""))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	conn, err := grpc.NewClient("unix://"+s.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	noError(t, err)
	t.Cleanup(func() { noError(t, conn.Close()) })
	return &killSite{keptSite: s, t: t, calls: proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "shoal")}
}

// points are in the order in which they are gone through.
func (k *killSite) points() []killPoint {
	ring := make([]pushed, 0, 8)
	for i := range cap(ring) {
		ring = append(ring, k.image(fmt.Sprintf("ring%d", i), 3<<20))
	}
	return []killPoint{
		{"prepare", k.snapshotCalls(0, func(ctx context.Context, key string) error {
			_, err := k.calls.Prepare(ctx, key, k.parent, rooted)
			return err
		}), 200 * time.Millisecond, false},
		{"commit", k.snapshotCalls(1, func(ctx context.Context, key string) error {
			return k.calls.Commit(ctx, key+"-done", key, rooted)
		}), 120 * time.Millisecond, false},
		{"remove", k.snapshotCalls(2, func(ctx context.Context, key string) error {
			return k.calls.Remove(ctx, key+"-done")
		}), 120 * time.Millisecond, false},
		{"pull", func() (func(context.Context) error, func()) {
			im := k.fresh(2 << 20)
			return func(ctx context.Context) error { return k.Pull(ctx, "shoal", im.ref) }, func() {
				k.pullAndRead(im)
				k.remove(im.ref)
			}
		}, time.Second, false},
		{"image removal", func() (func(context.Context) error, func()) {
			im := k.fresh(1 << 20)
			k.pullAndRead(im)
			return func(ctx context.Context) error {
				_, err := k.Ctr(ctx, "images", "rm", "--sync", im.ref)
				return err
			}, func() { k.remove(im.ref) }
		}, 60 * time.Millisecond, false},
		{"prefetch", func() (func(context.Context) error, func()) {
			im := k.fresh(4 << 20)
			k.pullLazily(im.ref)
			return func(ctx context.Context) error { return k.prefetch(ctx, "--local", k.node.Control, im.ref) }, func() {
				k.again("prefetch", func() error { return k.prefetch(k.t.Context(), "--local", k.node.Control, im.ref) })
				k.pullAndRead(im)
				k.remove(im.ref)
			}
		}, 800 * time.Millisecond, false},
		{"eviction", func() (func(context.Context) error, func()) {
			at := k.serial
			k.serial += 6
			one := func(i int) pushed { return ring[(at+i)%len(ring)] }
			return func(ctx context.Context) error {
				for i := range 6 {
					if err := k.prefetch(ctx, "--local", k.node.Control, one(i).ref); err != nil {
						return err
					}
				}
				return nil
			}, func() { k.keptImages(one(6)) }
		}, 4 * time.Second, false},
		{"ingest", func() (func(context.Context) error, func()) {
			im := k.fresh(3 << 20)
			return func(ctx context.Context) error { return k.prefetch(ctx, "", k.supernode.Control, im.ref) }, func() { k.ingested(im) }
		}, 250 * time.Millisecond, true},
		{"eviction by the supernode", func() (func(context.Context) error, func()) {
			// Nothing is in use after a start.
			noError(k.t, k.supernode.Stop())
			k.supernode = must(k.RestartSupernode(k.t.Context(), k.supernode))(k.t)
			var some []pushed
			for range 4 {
				some = append(some, k.fresh(3<<20))
			}
			cut := 0 // while this one was fetched
			return func(ctx context.Context) error {
					for ; cut < len(some); cut++ {
						if err := k.prefetch(ctx, "", k.supernode.Control, some[cut].ref); err != nil {
							return err
						}
					}
					return nil
				}, func() {
					// Until somebody does, what has come of it stays for a day.
					k.ingested(some[min(cut, len(some)-1)])
				}
		}, 3 * time.Second, true},
	}
}

// rooted keeps containerd's garbage collector away.
var rooted = snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "2024-01-01T00:00:00Z"})

// callsPerRound is how many snapshots there are for one kill.
const callsPerRound = 40

// snapshotCalls is what is to be under way of one kind of call; done says how many
// steps (prepare, commit) of each snapshot are behind it.
func (k *killSite) snapshotCalls(done int, call func(ctx context.Context, key string) error) func() (func(context.Context) error, func()) {
	return func() (func(context.Context) error, func()) {
		ctx := namespaces.WithNamespace(k.t.Context(), "default")
		k.serial++
		key := func(i int) string { return fmt.Sprintf("k%d-%d", k.serial, i) }
		for i := range callsPerRound {
			if done > 0 {
				_, err := k.calls.Prepare(ctx, key(i), k.parent, rooted)
				noError(k.t, err)
			}
			if done > 1 {
				noError(k.t, k.calls.Commit(ctx, key(i)+"-done", key(i), rooted))
			}
		}
		stopped := 0 // at this one
		return func(context.Context) error {
				for ; stopped < callsPerRound; stopped++ {
					if err := call(ctx, key(stopped)); err != nil {
						return err
					}
				}
				return nil
			}, func() {
				for i := min(stopped, callsPerRound-1); i < callsPerRound; i++ {
					k.again("the call that was cut off", func() error {
						err := call(ctx, key(i))
						if errdefs.IsAlreadyExists(err) || errdefs.IsNotFound(err) && done > 0 {
							return nil // it had been done
						}
						return err
					})
				}
				for i := range callsPerRound {
					for _, name := range []string{key(i) + "-done", key(i)} {
						k.again("remove", func() error {
							err := k.calls.Remove(ctx, name)
							if errdefs.IsNotFound(err) {
								return nil
							}
							return err
						})
					}
				}
			}
	}
}

func (k *killSite) snapshots() (all []snapshots.Info) {
	ctx := namespaces.WithNamespace(k.t.Context(), "default")
	noError(k.t, k.calls.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		all = append(all, i)
		return nil
	}))
	return all
}

// pushed is an image of two layers.
type pushed struct {
	ref   string
	files imageFiles
}

// image pushes one with so many bytes in each of its layers.
func (k *killSite) image(name string, size int) pushed {
	im := pushed{files: imageFiles{}}
	var layers []lab.Blob
	for l := range 2 {
		var entries []entry
		for f := range 4 {
			k.serial++
			path := fmt.Sprintf("l%d-f%d", l, f)
			im.files[path] = content(uint64(k.serial), size/4)
			entries = append(entries, file(path, im.files[path]))
		}
		layers = append(layers, lab.PlainLayer(makeTar(k.t, entries...)))
	}
	im.ref = k.push(k.t, name, layers...)
	return im
}

// fresh is an image that nobody has seen before.
func (k *killSite) fresh(size int) pushed {
	k.serial++
	return k.image(fmt.Sprintf("fresh%d", k.serial), size)
}

func (k *killSite) prefetch(ctx context.Context, local, control, ref string) error {
	args := []string{"prefetch", "--control", control}
	if local != "" {
		args = append(args, local)
	}
	_, err := k.Run(ctx, "shoal", append(args, ref)...)
	return err
}

// explained counts a call that was cut off and does not say so.
func (k *killSite) explained(what string, err error) {
	if err == nil || cutOff(err) {
		return
	}
	for _, why := range []string{"not found", "already exists", "no shoal daemon answers", "EOF", "no space left", "is shutting down", "unexpected end"} {
		if strings.Contains(err.Error(), why) {
			return
		}
	}
	k.unexplained++
	k.t.Logf("%s: %v", what, err)
}

// again does what was cut off once more, and counts it if that does not work.
func (k *killSite) again(what string, do func() error) {
	err := lab.WaitFor(k.t.Context(), what, 30*time.Second, func() error {
		err := do()
		if err != nil {
			k.explained(what, err)
		}
		return err
	})
	if err != nil {
		k.unexplained++
		k.t.Logf("again: %v", err)
	}
}

// pullLazily pulls an image, again and again while the supernode is not there.
func (k *killSite) pullLazily(ref string) {
	k.again("pull "+ref, func() error {
		if err := k.Pull(k.t.Context(), "shoal", ref); err != nil {
			return err
		}
		if !k.isLazy(k.t, k.t.Context(), ref) {
			k.remove(ref)
			return errors.New("error reading from server: it is not lazy") // the node says why
		}
		return nil
	})
}

// pullAndRead pulls an image and reads it as a container would.
func (k *killSite) pullAndRead(im pushed) {
	k.pullLazily(im.ref)
	dir := must(os.MkdirTemp(k.Dir, "view"))(k.t)
	var unmount func() error
	k.again("mount "+im.ref, func() (err error) {
		unmount, err = k.MountImage(k.t.Context(), "shoal", im.ref, dir)
		return err
	})
	if unmount == nil {
		return
	}
	for path, want := range im.files {
		k.readFiles++
		if got, err := os.ReadFile(filepath.Join(dir, path)); err != nil || string(got) != want {
			k.wrong = append(k.wrong, fmt.Sprintf("%s of %s: %v, or wrong bytes", path, im.ref, err))
		}
	}
	k.again("unmount", unmount)
	noError(k.t, os.RemoveAll(dir))
}

// remove removes an image, if it is there, and has containerd collect its garbage.
func (k *killSite) remove(ref string) {
	k.again("remove "+ref, func() error {
		_, err := k.Ctr(k.t.Context(), "images", "rm", "--sync", ref)
		if err != nil && strings.Contains(err.Error(), "not found") {
			return nil
		}
		return err
	})
}

// cycle pulls, reads and removes an image.
func (k *killSite) cycle(name string) {
	im := k.image(name, 1<<20)
	k.pullAndRead(im)
	k.remove(im.ref)
}

// ingested: after a start the supernode can fetch the image, and the node gets it.
func (k *killSite) ingested(im pushed) {
	k.again("ingest", func() error { return k.prefetch(k.t.Context(), "", k.supernode.Control, im.ref) })
	k.pullAndRead(im)
	k.remove(im.ref)
}

// keptImages takes away what was prefetched and not pulled, when one more of them
// has found its room.
func (k *killSite) keptImages(next pushed) {
	k.again("prefetch", func() error { return k.prefetch(k.t.Context(), "--local", k.node.Control, next.ref) })
	k.pullAndRead(next)
	for _, im := range must(k.node.Status(k.t.Context()))(k.t).Images {
		if strings.Contains(im.Ref, "/ring") {
			k.pullLazily(im.Ref)
			k.remove(im.Ref)
		}
	}
}

// files lists everything that a kill may leave: mounts, and files below the
// directories of node and supernode where only what is used is.
func (k *killSite) files() []string {
	all := must(k.Mounts())(k.t)
	for _, dir := range []string{"s", "l", "scratch", "tmp", "diffs", "m", "lazy", "quarantine"} {
		all = append(all, k.below(filepath.Join(k.node.Root, dir))...)
	}
	all = append(all, k.below(k.Path("super", "spool"))...)
	slices.Sort(all)
	return all
}

func (k *killSite) below(dir string) (all []string) {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(path, filepath.Join(k.node.Root, "m")+"/"):
			all = append(all, path)
			return fs.SkipDir // an image
		case d.Name() == "scrub" || d.Name() == "headers" || d.Name() == "proof":
			return nil // come and go with the work on a layer
		}
		all = append(all, path)
		return nil
	})
	noError(k.t, err)
	return all
}

// settled waits until there is again what there was before, after containerd has
// collected its garbage, and notes what stays; nil: there is nothing to compare with.
func (k *killSite) settled(when string, before []string) {
	ctx := k.t.Context()
	// Something has to go for containerd to look what a snapshotter has too much.
	nctx := namespaces.WithNamespace(ctx, "default")
	k.again("prepare", func() error {
		_, err := k.calls.Prepare(nctx, "nothing", "")
		if errdefs.IsAlreadyExists(err) {
			return nil
		}
		return err
	})
	k.again("remove", func() error {
		err := k.calls.Remove(nctx, "nothing")
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
	k.image("nothing", 4)
	ref := k.registry.Addr + "/nothing:v1"
	k.again("pull", func() error { return k.Pull(ctx, "overlayfs", ref) })
	k.remove(ref)
	if before == nil {
		return
	}
	var more []string
	err := lab.WaitFor(ctx, when, 15*time.Second, func() error {
		more = nil
		for _, f := range k.files() {
			if _, was := slices.BinarySearch(before, f); !was {
				more = append(more, f)
			}
		}
		if len(more) > 0 {
			return errors.New("something is left")
		}
		return nil
	})
	if err != nil {
		k.t.Logf("%s: %v is left", when, more)
		k.left = append(k.left, more...)
	}
}

// process is what a daemon holds.
type process struct{ descriptors, goroutines float64 }

func (k *killSite) processes() map[string]process {
	fds := func(pid int) (n float64) {
		for _, fd := range must(filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)))(k.t) {
			// The store keeps the files that it has used last open, some hundred of them.
			if to, err := os.Readlink(fd); err == nil && !strings.HasPrefix(to, k.Path("super", "store", "packs")) {
				n++
			}
		}
		return n
	}
	ctx := k.t.Context()
	return map[string]process{
		"keep":      {fds(k.node.Pid()), 0},
		"node":      {fds(must(k.node.Child())(k.t)), must(k.node.Metric(ctx, "go_goroutines"))(k.t)},
		"supernode": {fds(k.supernode.Pid()), must(k.supernode.Metric(ctx, "go_goroutines"))(k.t)},
	}
}

// grown waits until the daemons hold what they held before, and says what is more.
// A few connections and their goroutines come and go by themselves.
func (k *killSite) grown(before map[string]process) (more []string) {
	const descriptors, goroutines = 4, 12
	_ = lab.WaitFor(k.t.Context(), "", 30*time.Second, func() error {
		more = nil
		for name, now := range k.processes() {
			was := before[name]
			if now.descriptors > was.descriptors+descriptors || now.goroutines > was.goroutines+goroutines {
				more = append(more, fmt.Sprintf("%s: %v descriptors, %v before; %v goroutines, %v before",
					name, now.descriptors, was.descriptors, now.goroutines, was.goroutines))
			}
		}
		if len(more) > 0 {
			return errors.New("more than before")
		}
		return nil
	})
	k.t.Logf("before: %+v, now: %+v", before, k.processes())
	return more
}
