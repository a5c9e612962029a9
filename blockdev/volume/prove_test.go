package volume

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/index"
	builder "github.com/shoalfs/shoal/blockdev/layer"
)

// waitProof waits for the queue to get to a diff.
func (n *node) waitProof(l *layer, want cache.ProofState) {
	n.t.Helper()
	v, err := n.volume(l.id)
	if err != nil {
		n.t.Fatal(err)
	}
	a, err := n.queues.proofs.add(v, false)
	if err != nil {
		n.t.Fatal(err)
	}
	<-a.done
	if s := n.stat(l); s.Proof != want {
		n.t.Fatalf("%v: state is %v, want %v", l.id, s.Proof, want)
	}
}

// TestProof: what has been prefetched is proven without being asked, and what an
// earlier process did not get to, after a restart.
func TestProof(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 40, 1<<20)
	n.add(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	if s := n.stat(l); !s.Complete || s.Proof != cache.Proven {
		t.Errorf("after PrefetchWait: %+v", s)
	}
	if err := os.Remove(filepath.Join(n.root, "diffs", l.id.Hex(), "proof")); err != nil {
		t.Fatal(err)
	}
	n.restart()
	n.waitProof(l, cache.Proven)
	n.check(l, n.mountDir(l))
}

// TestProofDamage: what a proof finds damaged on this disk is fetched again.
func TestProofDamage(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 41, 1<<20)
	n.add(l)
	for _, p := range l.index.Headers { // so that it is not proven before the damage
		n.src.Delete(p.Digest)
	}
	if err := n.PrefetchWait(t.Context(), l.id, nil); !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatalf("without a header stream: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.root, "diffs", l.id.Hex(), "data")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := []byte{0}
	if _, err := f.ReadAt(b, 5000); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, 5000); err != nil {
		t.Fatal(err)
	}
	f.Close()
	n.src.PutLayer(l.Layer)
	n.open()
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	if s := n.stat(l); s.Proof != cache.Proven || n.Counters().DamagedChunks != 1 {
		t.Errorf("%+v, %+v", s, n.Counters())
	}
	n.check(l, n.mountDir(l))
}

// TestQuarantine: a layer whose index is a lie is read by those who have it
// mounted, and mounted for nobody else, also after a restart.
func TestQuarantine(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 42, 1<<20)
	ix := l.Clone()
	ix.Implied = append(ix.Implied, "not/there")
	var err error
	if l.encoded, err = index.Encode(ix); err != nil {
		t.Fatal(err)
	}
	n.add(l)
	dir := n.mountDir(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); !errors.Is(err, blockdev.ErrQuarantined) {
		t.Fatalf("PrefetchWait: %v", err)
	}
	check := func(when string) {
		t.Helper()
		if _, err := n.Mount(t.Context(), l.id); !errors.Is(err, blockdev.ErrQuarantined) {
			t.Errorf("%s: Mount: %v", when, err)
		}
		if _, err := n.Add(t.Context(), l.encoded); !errors.Is(err, blockdev.ErrQuarantined) {
			t.Errorf("%s: Add: %v", when, err)
		}
		if err := n.PrefetchWait(t.Context(), l.id, nil); !errors.Is(err, blockdev.ErrQuarantined) {
			t.Errorf("%s: PrefetchWait: %v", when, err)
		}
		if s := n.stat(l); s.Proof != cache.Quarantined {
			t.Errorf("%s: %+v", when, s)
		}
	}
	check("at once")
	n.check(l, dir)
	n.restart()
	check("after a restart")
	if err := n.Remove(t.Context(), l.id); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Add(t.Context(), l.encoded); !errors.Is(err, blockdev.ErrQuarantined) {
		t.Errorf("after removal: %v", err)
	}
}

// TestProofsWait: proofs wait for prefetch, unless somebody waits for them.
func TestProofsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, proofs := testQueues(1)
		var vols []*volume
		begin := time.Now()
		var mu sync.Mutex
		began := map[string]time.Duration{}
		for _, name := range []string{"fetched", "first", "second", "hurried"} {
			d := &fakeDiff{name: name}
			d.prefetch = func(context.Context) error { time.Sleep(time.Minute); return nil }
			if name != "fetched" {
				d.prove = func(context.Context, bool) error {
					mu.Lock()
					began[name] = time.Since(begin)
					mu.Unlock()
					time.Sleep(time.Second)
					return nil
				}
			}
			vols = append(vols, &volume{id: d.ID(), diff: d, turn: make(chan struct{}, 1)})
		}
		add := func(q *queue, v *volume, front bool) *attempt {
			a, err := q.add(v, front)
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		add(q, vols[0], false)
		first, second := add(proofs, vols[1], false), add(proofs, vols[2], false)
		synctest.Wait()
		hurried := add(proofs, vols[3], true)
		<-hurried.done
		<-first.done
		<-second.done
		mu.Lock()
		if began["hurried"] != 0 || began["first"] != time.Minute || began["second"] != time.Minute+time.Second {
			t.Errorf("began %v", began)
		}
		mu.Unlock()
		// One that is dropped does not hold up the others.
		add(q, vols[0], false)
		add(proofs, vols[1], false)
		if err := proofs.drop(t.Context(), vols[1]); err != nil {
			t.Fatal(err)
		}
		<-add(proofs, vols[2], false).done
		q.close(vols)
		proofs.close(vols)
	})
}

// TestScrub: damage under a native mount is found without anybody's reading it,
// fetched again, and right for who reads through that mount from then on.
func TestScrub(t *testing.T) {
	n := newNode(t, func(c *Config) { c.ScrubInterval = -1 })
	l := newLayer(t, 43, 1<<20)
	n.add(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	dir := n.mountDir(l)
	f, err := os.OpenFile(filepath.Join(n.root, "diffs", l.id.Hex(), "data"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{l.data[5000] ^ 1}, 5000); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || bytes.Equal(got, l.content) {
		t.Fatalf("the damage does not show: %v", err)
	}
	v, err := n.volume(l.id)
	if err != nil {
		t.Fatal(err)
	}
	a, err := n.queues.scrubs.add(v, false)
	if err != nil {
		t.Fatal(err)
	}
	if <-a.done; !errors.Is(a.err, cache.ErrDamaged) {
		t.Fatalf("scrub: %v", a.err)
	}
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	// The page cache is dropped behind the repair.
	for deadline := time.Now().Add(20 * time.Second); ; {
		got, err := os.ReadFile(filepath.Join(dir, "file"))
		if err == nil && bytes.Equal(got, l.content) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the mount shows wrong bytes after the repair: %v", err)
		}
	}
}

// TestScrubber: what has not been checked for long enough is, by itself.
func TestScrubber(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 44, 1<<20)
	n.add(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	scrubbed := filepath.Join(n.root, "diffs", l.id.Hex(), "scrubbed")
	long := time.Now().Add(-2 * defaultScrub)
	if err := os.Chtimes(scrubbed, long, long); err != nil {
		t.Fatal(err)
	}
	n.restart()
	for deadline := time.Now().Add(20 * time.Second); ; runtime.Gosched() {
		if st, err := os.Stat(scrubbed); err == nil && st.ModTime().After(long) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("never scrubbed")
		}
	}
}

// builtByAnother gives a layer the index of another version of shoal: its file is "FILE".
func (l *layer) builtByAnother(t *testing.T) {
	t.Helper()
	other, err := blockdevtest.NewLayer(blockdevtest.File{Name: "FILE", Data: l.content}) // the same masked diff
	if err != nil {
		t.Fatal(err)
	}
	ix := l.Clone()
	ix.Builder, ix.Meta = builder.BuilderVersion+1, other.Index.Meta
	if l.encoded, err = index.Encode(ix); err != nil {
		t.Fatal(err)
	}
}

// TestProofAnotherBuilder: a layer whose index another version of shoal has made, with
// another tree, is mounted anew for who comes after the proof; who has it mounted keeps it.
func TestProofAnotherBuilder(t *testing.T) {
	for name, native := range map[string]bool{"lazy": false, "native": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, nil)
			l := newLayer(t, 45, 1<<20)
			l.builtByAnother(t)
			n.add(l)
			if native {
				for _, p := range l.index.Headers { // so that it is not proven before it is mounted
					n.src.Delete(p.Digest)
				}
				if err := n.PrefetchWait(t.Context(), l.id, nil); !errors.Is(err, blockdev.ErrNotFound) {
					t.Fatalf("without a header stream: %v", err)
				}
			}
			dir := n.mountDir(l)
			user, err := os.Open(filepath.Join(dir, "FILE"))
			if err != nil {
				t.Fatal(err)
			}
			defer user.Close()
			n.src.PutLayer(l.Layer)
			if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
				t.Fatal(err)
			}
			if s := n.stat(l); s.Proof != cache.Proven {
				t.Fatalf("%+v", s)
			}
			if native {
				n.restart() // which takes the mount over as it is
			}
			dir = n.mountDir(l)
			n.check(l, dir)
			if _, err := os.Stat(filepath.Join(dir, "FILE")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the tree that came is still shown: %v", err)
			}
			got := make([]byte, len(l.content))
			if _, err := user.ReadAt(got, 0); err != nil || !bytes.Equal(got, l.content) {
				t.Errorf("who used the mount before: %v", err)
			}
			n.restart()
			n.check(l, n.mountDir(l))
		})
	}
}
