package integration

import (
	"archive/tar"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// keptSite is a site whose node runs under keep, with an image that is mounted
// lazily and read all the time.
type keptSite struct {
	*site
	link *lab.Link // to the supernode
}

// newKeptSite: rate bounds the link to the supernode.
func newKeptSite(t *testing.T, rate lab.Rate, env ...string) *keptSite {
	t.Helper()
	return newKeptSiteWith(t, "", rate, env...)
}

// newKeptSiteWith: config is for the node.
func newKeptSiteWith(t *testing.T, config string, rate lab.Rate, env ...string) *keptSite {
	t.Helper()
	s := &keptSite{site: &site{Lab: newLab(t)}}
	s.registry = must(s.StartRegistry(t.Context(), "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", ""))(t)
	s.link = must(s.NewLink(s.supernode.HostPort(), rate, 0))(t)
	s.node = must(s.StartKeptNode(t.Context(), "node", s.supernode.Via(s.link), config, env...))(t)
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

// install has keep replace the node's program, and says whether that one took over.
func (s *keptSite) install(t *testing.T, program string) (ok bool) {
	t.Helper()
	noError(t, s.node.Install(program))
	return must(s.node.Upgrade(t.Context()))(t)
}

// TestDrillUpgrade replaces the node's program under load: the previous version's by
// this one and back, with its data and mounts, and now and then by one that does
// not get ready.
func TestDrillUpgrade(t *testing.T) {
	s := newKeptSite(t, 8<<20)
	ctx := t.Context()
	d := &tally{drill: "upgrade of the node under load, old to new and back", rounds: min(rounds(t, 6), 50)}
	programs := []string{previousBuild(t, s.Lab), must(filepath.Abs(filepath.Join(s.Bin, "shoal")))(t)}
	if !s.install(t, programs[0]) {
		t.Fatal("the previous version did not take over")
	}
	l := s.startLoad(t)
	_, here := s.pullFiles(t, "here", 1, 32, 300_000)
	_, coming := s.pullFiles(t, "coming", 1000, 64, 1_000_000)
	local, slow := lab.StartReaders(2, here), lab.StartReaders(2, coming)
	mounts := s.mounted(t)
	l.goOn(t)
	var broken pauses
	refused := 0
	for i := range d.rounds {
		if i%5 == 0 {
			local.Longest()
			if s.install(t, "/bin/false") {
				t.Error("a program that only fails took over")
			}
			noError(t, goOn(ctx, local, 20))
			broken = append(broken, local.Longest())
		}
		program := programs[(i+1)%2]
		local.Longest()
		wait(ctx, rand.N(time.Second))
		d.calm = append(d.calm, local.Longest())
		if !s.install(t, program) {
			refused++
		}
		noError(t, goOn(ctx, local, 20))
		d.pauses = append(d.pauses, local.Longest())
		version := must(s.Run(ctx, program, "version"))(t)
		if st := must(s.node.Status(ctx))(t); len(st.Images) != 3 || !strings.Contains(version, st.Version) {
			t.Errorf("after the upgrade to %s: version %s, %d images", version, st.Version, len(st.Images))
		}
		// The calls of containerd find the next one as well.
		must(s.Ctr(ctx, "snapshots", "--snapshotter", "shoal", "ls"))(t)
	}
	l.goOn(t)
	count(t, d.drill+": mounts left over", s.mounted(t)-mounts)
	d.end(local, slow)
	l.into(t, d)
	d.rows(t)
	count(t, d.drill+": did not take over", refused)
	figure(t, d.drill+": pause p99", "s", report.AtMost, 0.2, d.pauses.at(0.99).Seconds())
	figure(t, "upgrade to a program that ends at once: longest pause", "s", "", 0, broken.at(1).Seconds())
}

// TestDrillOwnImage runs a node whose program lies on an image that it serves
// itself, on one of Go's CPUs, and kills it again and again.
func TestDrillOwnImage(t *testing.T) {
	s := newKeptSite(t, 0, "GOMAXPROCS=1")
	ctx := t.Context()
	d := &tally{drill: "kill -9 of a node with GOMAXPROCS=1 whose program it serves itself", rounds: min(rounds(t, 5), 100)}
	program := string(must(os.ReadFile(filepath.Join(s.Bin, "shoal")))(t))
	ref := s.push(t, "shoal", lab.PlainLayer(makeTar(t, file("shoal", program).with(func(h *tar.Header) { h.Mode = 0o755 }))))
	noError(t, s.Pull(ctx, "shoal", ref))
	installed := filepath.Join(s.mountImage(t, "shoal", ref), "shoal")
	_, files := s.pullFiles(t, "app", 1, 16, 300_000)
	if !s.install(t, installed) {
		t.Fatal("the program on the image did not get ready")
	}
	readers := lab.StartReaders(2, append(files, lab.Checked{Path: installed, Data: []byte(program)}))
	stuck := 0
	for range d.rounds {
		wait(ctx, rand.N(500*time.Millisecond))
		readers.Longest()
		must(s.node.KillNode(ctx))(t)
		if err := goOn(ctx, readers, 10); err != nil {
			t.Log(err)
			stuck = 1
			break
		}
		d.pauses = append(d.pauses, readers.Longest())
	}
	count(t, d.drill+": deadlocks", stuck)
	if stuck == 0 {
		d.end(readers)
	} else { // they would never end
		d.add(readers.Reads())
	}
	d.rows(t)
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
// the last release.
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
	rev, err := git("describe", "--tags", "--abbrev=0", "--match=v[0-9]*", "--exclude=*-rc.*", "HEAD^")
	if err != nil {
		rev, err = git("-C", top, "rev-list", "-n", "1", "--skip=1", "HEAD", "--", "cmd", "blockdev", "snapshotter", "supernode", "p2p")
	}
	if err == nil {
		_, err = git("-C", top, "cat-file", "-e", rev+":cmd/shoal/internal/fdstore/fdstore.go") // it can take over
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
