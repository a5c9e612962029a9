package integration

import (
	"archive/tar"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// rounds is how often something is broken: SHOAL_ROUNDS, or the short number.
func rounds(t *testing.T, short int) int {
	t.Helper()
	s := os.Getenv("SHOAL_ROUNDS")
	if s == "" {
		return short
	}
	return must(strconv.Atoi(s))(t)
}

// keptSite is a site whose node runs under keep, with an image that is mounted
// lazily and read all the time.
type keptSite struct {
	*site
	link *lab.Link // to the supernode
}

// newKeptSite: rate bounds the link to the supernode.
func newKeptSite(t *testing.T, rate lab.Rate, env ...string) *keptSite {
	t.Helper()
	s := &keptSite{site: &site{Lab: newLab(t)}}
	s.registry = must(s.StartRegistry(t.Context(), "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", ""))(t)
	s.link = must(s.NewLink(s.supernode.HostPort(), rate, 0))(t)
	s.node = must(s.StartKeptNode(t.Context(), "node", s.supernode.Via(s.link), "", env...))(t)
	s.Containerd = must(s.StartContainerd(t.Context(), "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	return s
}

// content is n random bytes.
func content(seed uint64, n int) string {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = rng.Read(b) // never fails
	return string(b)
}

// pullFiles pulls an image of two layers with files of random content, lazily,
// and returns what is mounted.
func (s *keptSite) pullFiles(t *testing.T, name string, seed uint64, files, size int) (ref string, mounted []lab.Checked) {
	t.Helper()
	var layers []lab.Blob
	var all []lab.Checked
	for l := range 2 {
		entries := []entry{dir(fmt.Sprintf("d%d/", l))}
		for i := range files / 2 {
			f := lab.Checked{Path: fmt.Sprintf("d%d/f%d", l, i), Data: []byte(content(seed+uint64(l*files+i), size+i))}
			entries = append(entries, file(f.Path, string(f.Data)))
			all = append(all, f)
		}
		layers = append(layers, layer(t, entries...))
	}
	ref = s.push(t, name, layers...)
	must(s.Run(t.Context(), "shoal", "prefetch", "--control", s.supernode.Control, ref))(t)
	if err := s.Pull(t.Context(), "shoal", ref); err != nil {
		t.Fatal(err)
	}
	if !s.isLazy(t, t.Context(), ref) {
		t.Fatalf("%s is not lazy", ref)
	}
	view := s.mountImage(t, "shoal", ref)
	for i := range all {
		all[i].Path = filepath.Join(view, all[i].Path)
	}
	return ref, all
}

// pauses are the longest reads of each round.
type pauses []time.Duration

func (p pauses) String() string {
	slices.Sort(p)
	at := func(q float64) time.Duration { return p[int(q*float64(len(p)-1))].Round(time.Millisecond) }
	return fmt.Sprintf("%d rounds: longest read p50 %v, p99 %v, max %v", len(p), at(0.5), at(0.99), at(1))
}

// TestKillUnderLoad kills the node again and again while programs read, from
// files that are here and from files that are still being fetched.
func TestKillUnderLoad(t *testing.T) {
	s := newKeptSite(t, 8<<20)
	ctx := t.Context()
	ref, here := s.pullFiles(t, "here", 1, 32, 300_000)
	if err := s.node.WaitLocal(ctx, ref, time.Minute); err != nil {
		t.Fatal(err)
	}
	_, coming := s.pullFiles(t, "coming", 1000, 64, 1_000_000)
	local, slow := lab.StartReaders(4, here), lab.StartReaders(2, coming)
	mounts := len(must(s.Mounts())(t))
	var took pauses
	for range rounds(t, 10) {
		wait(ctx, rand.N(time.Second))
		local.Longest()
		must(s.node.KillNode(ctx))(t)
		before := local.Reads()
		// Each of them has been answered by the next process, or waits for it.
		err := lab.WaitFor(ctx, "reads after a kill", 30*time.Second, func() error {
			if n := local.Reads() - before; n < 20 {
				return fmt.Errorf("%d reads", n)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, local.Longest())
	}
	for _, err := range append(local.Stop(), slow.Stop()...) {
		t.Error(err)
	}
	t.Logf("%v; %d reads of local bytes, %d of bytes on their way", took, local.Reads(), slow.Reads())
	if now := len(must(s.Mounts())(t)); now != mounts {
		t.Errorf("%d mounts, %d before", now, mounts)
	}
}

// wait is the moment at which something is broken.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// TestUpgradeUnderLoad replaces the node's program again and again while programs
// read, by one that works and now and then by one that does not.
func TestUpgradeUnderLoad(t *testing.T) {
	s := newKeptSite(t, 0)
	ctx := t.Context()
	ref, files := s.pullFiles(t, "app", 1, 32, 300_000)
	if err := s.node.WaitLocal(ctx, ref, time.Minute); err != nil {
		t.Fatal(err)
	}
	readers := lab.StartReaders(4, files)
	var took pauses
	shoal := must(filepath.Abs(filepath.Join(s.Bin, "shoal")))(t)
	mounts := len(must(s.Mounts())(t))
	for i := range rounds(t, 6) {
		program, want := shoal, true
		if i%3 == 2 {
			program, want = "/bin/false", false
		}
		if err := s.node.Install(program); err != nil {
			t.Fatal(err)
		}
		readers.Longest()
		if ok := must(s.node.Upgrade(ctx))(t); ok != want {
			t.Errorf("upgrade to %s: %v", program, ok)
		}
		must(s.node.Status(ctx))(t)
		if want {
			took = append(took, readers.Longest())
		}
		// The calls of containerd find the next one as well.
		must(s.Ctr(ctx, "snapshots", "--snapshotter", "shoal", "ls"))(t)
	}
	for _, err := range readers.Stop() {
		t.Error(err)
	}
	t.Logf("%v; %d reads", took, readers.Reads())
	if now := len(must(s.Mounts())(t)); now != mounts {
		t.Errorf("%d mounts, %d before", now, mounts)
	}
}

// TestProgramFromImage runs a node whose program lies on an image that it serves
// itself, on one of Go's CPUs, and kills it again and again.
func TestProgramFromImage(t *testing.T) {
	s := newKeptSite(t, 0, "GOMAXPROCS=1")
	ctx := t.Context()
	program := string(must(os.ReadFile(filepath.Join(s.Bin, "shoal")))(t))
	ref := s.push(t, "shoal", lab.PlainLayer(makeTar(t, file("shoal", program).with(func(h *tar.Header) { h.Mode = 0o755 }))))
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	installed := filepath.Join(s.mountImage(t, "shoal", ref), "shoal")
	_, files := s.pullFiles(t, "app", 1, 16, 300_000)
	if err := s.node.Install(installed); err != nil {
		t.Fatal(err)
	}
	if !must(s.node.Upgrade(ctx))(t) {
		t.Fatal("the program on the image did not get ready")
	}
	files = append(files, lab.Checked{Path: installed, Data: []byte(program)})
	readers := lab.StartReaders(2, files)
	for range rounds(t, 5) {
		wait(ctx, rand.N(500*time.Millisecond))
		must(s.node.KillNode(ctx))(t)
		before := readers.Reads()
		err := lab.WaitFor(ctx, "reads after a kill", 30*time.Second, func() error {
			if n := readers.Reads() - before; n < 10 {
				return fmt.Errorf("%d reads", n)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range readers.Stop() {
		t.Error(err)
	}
}

// TestKillDuringCalls kills the node while containerd makes, commits and removes
// snapshots. A call may fail, and then says why; the next one succeeds.
func TestKillDuringCalls(t *testing.T) {
	s := newKeptSite(t, 0)
	ctx := t.Context()
	ref, _ := s.pullFiles(t, "app", 1, 8, 100_000)
	chain := must(s.Ctr(ctx, "snapshots", "--snapshotter", "shoal", "ls"))(t)
	parent := ""
	for _, l := range strings.Split(chain, "\n") {
		if f := strings.Fields(l); len(f) == 3 && f[2] == "Committed" && f[1] != "" {
			parent = f[0]
		}
	}
	if parent == "" {
		t.Fatalf("%s has no snapshot with a parent:\n%s", ref, chain)
	}
	calls, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	var done, failed atomic.Int64
	wg.Go(func() {
		for i := 0; calls.Err() == nil; i++ {
			key := fmt.Sprint("k", i)
			for _, args := range [][]string{{"prepare", key, parent}, {"commit", key + "-done", key}, {"rm", key + "-done"}} {
				_, err := s.Ctr(ctx, append([]string{"snapshots", "--snapshotter", "shoal"}, args...)...)
				switch {
				case err == nil:
					done.Add(1)
				case cutOff(err), strings.Contains(err.Error(), "not found"), strings.Contains(err.Error(), "already exists"):
					// Under way when the node was killed; or it needs one that was.
					failed.Add(1)
				default:
					t.Errorf("%v: %v", args, err)
				}
			}
		}
	})
	waited := 0
	n := rounds(t, 10)
	for range n {
		wait(ctx, rand.N(300*time.Millisecond))
		must(s.node.KillNode(ctx))(t)
		// What begins now waits for the next process, unless containerd does not
		// know yet that its connection is gone.
		_, err := s.Ctr(ctx, "snapshots", "--snapshotter", "shoal", "ls")
		if err == nil {
			waited++
		} else if t.Logf("call after a kill: %v", err); !cutOff(err) {
			t.Error("which says not enough")
		}
		must(s.node.Status(ctx))(t)
	}
	if waited < n/2 {
		t.Errorf("%d of %d calls waited", waited, n)
	}
	stop()
	wg.Wait()
	if done.Load() == 0 {
		t.Error("no call succeeded")
	}
	t.Logf("%d calls succeeded, %d failed; %d of %d waited", done.Load(), failed.Load(), waited, n)
	if err := s.node.WaitLocal(ctx, ref, time.Minute); err != nil {
		t.Error(err)
	}
}

// cutOff says whether a call failed because the connection broke under it.
func cutOff(err error) bool {
	for _, s := range []string{"error reading from server", "connection error", "transport is closing", "connection reset"} {
		if strings.Contains(err.Error(), s) {
			return true
		}
	}
	return false
}

// previousBuild builds the program as it was before the last change to it, or at
// the last tag.
func previousBuild(t *testing.T, l *lab.Lab) string {
	t.Helper()
	git := func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), "git", args...).Output()
		return strings.TrimSpace(string(out)), err
	}
	top, err := git("rev-parse", "--show-toplevel")
	if err != nil {
		t.Skip("not a git checkout: there is no previous version to build")
	}
	rev, err := git("describe", "--tags", "--abbrev=0", "HEAD^")
	if err != nil {
		rev, err = git("-C", top, "rev-list", "-n", "1", "--skip=1", "HEAD", "--", "cmd", "blockdev", "snapshotter", "supernode", "p2p")
	}
	if err == nil {
		_, err = git("-C", top, "cat-file", "-e", rev+":cmd/shoal/restart.go") // it can take over
	}
	if err != nil || rev == "" {
		t.Skip("the history is cut off before the previous version: fetch all of it")
	}
	tree, program := l.Path("previous"), l.Path("shoal-"+rev)
	if out, err := exec.CommandContext(t.Context(), "git", "-C", top, "worktree", "add", "--detach", tree, rev).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l.OnClose(func() error {
		return exec.Command("git", "-C", top, "worktree", "remove", "--force", tree).Run()
	})
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+rev, "-o", program, "./cmd/shoal")
	build.Dir = tree
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", rev, err, out)
	}
	return program
}

// TestPreviousVersion upgrades from the previous version, on its data and with its
// mounts, and goes back, while programs read.
func TestPreviousVersion(t *testing.T) {
	s := newKeptSite(t, 0)
	ctx := t.Context()
	programs := []string{previousBuild(t, s.Lab), must(filepath.Abs(filepath.Join(s.Bin, "shoal")))(t)}
	upgrade := func(program string) {
		t.Helper()
		if err := s.node.Install(program); err != nil {
			t.Fatal(err)
		}
		if !must(s.node.Upgrade(ctx))(t) {
			t.Fatalf("%s did not take over", program)
		}
	}
	upgrade(programs[0])
	_, files := s.pullFiles(t, "app", 1, 16, 300_000)
	readers := lab.StartReaders(2, files)
	for i := range 4 {
		program := programs[(i+1)%2]
		upgrade(program)
		version := must(s.Run(ctx, program, "version"))(t)
		if st := must(s.node.Status(ctx))(t); len(st.Images) != 1 || !strings.Contains(version, st.Version) {
			t.Errorf("after the upgrade to %s: version %s, %d images", version, st.Version, len(st.Images))
		}
		before := readers.Reads()
		err := lab.WaitFor(ctx, "reads after an upgrade", 30*time.Second, func() error {
			if n := readers.Reads() - before; n < 10 {
				return fmt.Errorf("%d reads", n)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range readers.Stop() {
		t.Error(err)
	}
}
