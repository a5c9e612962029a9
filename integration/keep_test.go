package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
	link    *lab.Link // to the supernode
	readers *lab.Readers
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
