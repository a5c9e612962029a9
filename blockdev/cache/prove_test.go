package cache

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
)

// newProofRig is a rig whose diff is a real layer, all of which is local.
func newProofRig(t *testing.T, edit func(*blockdev.Index)) (*rig, *blockdevtest.Layer) {
	t.Helper()
	r := newRig(t, 1<<20, func(c *Config) { c.GiveWay, c.Quiet = time.Millisecond, time.Nanosecond })
	l, err := blockdevtest.NewLayer(
		blockdevtest.File{Name: "a", Data: blockdevtest.Bytes(11, 3<<20)},
		blockdevtest.File{Name: "b", Data: []byte(strings.Repeat("text ", 1<<10))})
	if err != nil {
		t.Fatal(err)
	}
	r.ix = l.Clone()
	if edit != nil {
		edit(r.ix)
	}
	r.data, r.want = l.Masked, padded(l.Masked)
	r.mem.PutLayer(l)
	r.d = r.add(r.ix)
	r.prefetch()
	return r, l
}

func (r *rig) prove() {
	r.t.Helper()
	if err := r.d.Prove(context.Background(), true); err != nil {
		r.t.Fatal(err)
	}
	if r.d.Proof() != Proven {
		r.t.Fatalf("state is %v after a proof", r.d.Proof())
	}
}

// TestProve: a proof is made once, and remembered.
func TestProve(t *testing.T) {
	r, _ := newProofRig(t, nil)
	if r.d.Proof() != Unproven {
		t.Fatalf("state is %v before the proof", r.d.Proof())
	}
	if err := r.d.Prove(t.Context(), false); err != nil { // at its own pace
		t.Fatal(err)
	}
	r.mem.Record()
	r.reopen()
	if r.d.Proof() != Proven || r.d.Stat().Proof != Proven {
		t.Errorf("state is %v after a restart", r.d.Proof())
	}
	r.prove()
	if n := len(r.mem.Requests()); n != 0 {
		t.Errorf("%d requests for what is proven", n)
	}
}

// TestProveWithoutNetwork: once the header stream is here, nobody is asked again.
func TestProveWithoutNetwork(t *testing.T) {
	r, l := newProofRig(t, nil)
	r.prove()
	if err := os.Remove(filepath.Join(r.d.dir, proofFile)); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	for _, p := range l.Index.Headers {
		r.mem.Delete(p.Digest)
	}
	r.prove()
	// But not if a piece has been damaged on disk.
	if err := os.Remove(filepath.Join(r.d.dir, proofFile)); err != nil {
		t.Fatal(err)
	}
	flipFile(t, r.d.path(headersFile), 10)
	r.reopen()
	if err := r.d.Prove(t.Context(), true); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("header stream damaged, and nobody has it: %v", err)
	}
	r.mem.PutLayer(l)
	r.prove()
}

// TestProveDamagedRecord: a damaged record of a proof proves nothing.
func TestProveDamagedRecord(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"empty":   func(p string) error { return os.Truncate(p, 0) },
		"garbage": func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte{0xff}, 300), 0o600) },
		"huge":    func(p string) error { return os.Truncate(p, 1<<30) },
		"another index": func(p string) error {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			at := bytes.Index(b, []byte(`"index":"sha256:`)) + len(`"index":"sha256:`)
			b[at] ^= 1
			return os.WriteFile(p, b, 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := newProofRig(t, nil)
			r.prove()
			if err := change(filepath.Join(r.d.dir, proofFile)); err != nil {
				t.Fatal(err)
			}
			r.reopen()
			if r.d.Proof() != Unproven {
				t.Errorf("state is %v", r.d.Proof())
			}
			r.prove()
		})
	}
}

// TestProveNeedsAllBytes: what is missing or damaged on this disk is nobody's lie.
func TestProveNeedsAllBytes(t *testing.T) {
	r, _ := newProofRig(t, nil)
	flipFile(t, r.d.DataPath(), r.d.tab.Start(3)+5)
	disk.Drop(r.d.data, 0, 0)
	if err := r.d.Prove(t.Context(), true); !errors.Is(err, ErrDamaged) {
		t.Fatalf("a bit was flipped: %v", err)
	}
	if err := r.d.Prove(t.Context(), true); !errors.Is(err, ErrIncomplete) {
		t.Fatalf("a chunk is missing: %v", err)
	}
	if r.d.Proof() != Unproven || r.Stats().Quarantined != 0 || r.Stats().DamagedChunks != 1 {
		t.Errorf("state %v, counters %+v", r.d.Proof(), r.Stats())
	}
	r.prefetch()
	r.prove()
}

// TestProveSourceFails: an outage says nothing about the index.
func TestProveSourceFails(t *testing.T) {
	r, _ := newProofRig(t, nil)
	r.source(func(_ context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		for i, c := range req.Chunks {
			if c.Offset < r.d.DiffSize() {
				t.Errorf("a piece is asked for at offset %d, within the diff", c.Offset)
			}
			if err := deliver(i, make([]byte, c.Length)); !errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("wrong bytes are taken: %v", err)
			}
		}
		return blockdev.ErrCorrupt
	})
	if err := r.d.Prove(t.Context(), true); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("source with wrong bytes: %v", err)
	}
	r.source(func(context.Context, blockdev.Request, blockdev.Deliver) error { return nil })
	if err := r.d.Prove(t.Context(), true); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("source that delivers nothing: %v", err)
	}
	r.source(r.mem.Fetch)
	if r.d.Proof() != Unproven {
		t.Errorf("state is %v", r.d.Proof())
	}
	r.prove()
}

// TestQuarantine: an index that is not that of its DiffID is found out once all
// bytes are there, and not taken in again, also after a restart.
func TestQuarantine(t *testing.T) {
	lie := func(ix *blockdev.Index) { ix.Meta[1<<10] ^= 1 }
	r, l := newProofRig(t, lie)
	bad := encode(t, r.ix)
	var told []blockdev.Digest
	r.cfg.Distrusted = func(id blockdev.Digest, why error) {
		told = append(told, id)
		if !errors.Is(why, blockdev.ErrQuarantined) {
			t.Errorf("observed: %v", why)
		}
	}
	r.reopen()
	check := func(when string) {
		t.Helper()
		err := r.d.Distrust()
		if r.d.Proof() != Quarantined || !errors.Is(err, blockdev.ErrQuarantined) {
			t.Fatalf("%s: state %v, %v", when, r.d.Proof(), err)
		}
		for _, want := range []string{r.d.id.String(), "metadata differs", "To go on", filepath.Join(quarantineDir, r.d.id.Hex())} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v does not say %q", when, err, want)
			}
		}
		if _, err := r.Add(t.Context(), bad); !errors.Is(err, blockdev.ErrQuarantined) {
			t.Errorf("%s: added again: %v", when, err)
		}
		// Readers that are there go on.
		r.checkRead(0, 1<<20)
	}
	for range 2 {
		if err := r.d.Prove(t.Context(), true); !errors.Is(err, blockdev.ErrQuarantined) {
			t.Fatalf("proof of a lie: %v", err)
		}
	}
	check("at once")
	if n := r.log.count("the index is quarantined"); n != 1 {
		t.Errorf("%d log lines about it, want 1", n)
	}
	if !slices.Equal(told, []blockdev.Digest{r.d.id}) {
		t.Errorf("observed: %v", told)
	}
	if r.Stats().Quarantined != 1 {
		t.Errorf("counted %d times", r.Stats().Quarantined)
	}
	r.reopen()
	check("after a restart")

	// The right index cannot take its place while it is there, but afterwards.
	if _, err := r.Add(t.Context(), encode(t, l.Index)); !errors.Is(err, blockdev.ErrQuarantined) {
		t.Errorf("beside the wrong one: %v", err)
	}
	if err := r.Remove(t.Context(), r.d.id); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Add(t.Context(), bad); !errors.Is(err, blockdev.ErrQuarantined) {
		t.Errorf("after its removal: %v", err)
	}
	r.ix = l.Index
	r.d = r.add(l.Index)
	r.prefetch()
	r.prove()
	if left, err := os.ReadDir(filepath.Join(r.cfg.Root, quarantineDir)); err != nil || len(left) != 0 {
		t.Errorf("records left after the right index was proven: %v, %v", left, err)
	}
	r.reopen()
	r.prove()
}

// TestDamagedQuarantine: a record that cannot be read refuses every index of its
// diff, rather than none.
func TestDamagedQuarantine(t *testing.T) {
	r, l := newProofRig(t, nil)
	r.close()
	dir := filepath.Join(r.cfg.Root, quarantineDir)
	for name, b := range map[string][]byte{l.Index.DiffID.Hex(): nil, "README": []byte("by hand")} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	r.expect()
	if err := r.d.Distrust(); !errors.Is(err, blockdev.ErrQuarantined) {
		t.Errorf("%v", err)
	}
	if r.log.count("README") != 1 {
		t.Errorf("log does not name the file that is none:\n%s", r.log.b.String())
	}
}

// TestProveEnds: removal and a context that ends, end a proof.
func TestProveEnds(t *testing.T) {
	r, _ := newProofRig(t, nil)
	started := make(chan struct{}, 2)
	r.source(func(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
		started <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-started
		cancel()
	}()
	if err := r.d.Prove(ctx, true); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	removed := make(chan error, 1)
	go func() {
		<-started
		removed <- r.Remove(context.Background(), r.d.id)
	}()
	if err := r.d.Prove(t.Context(), true); !errors.Is(err, ErrRemoved) {
		t.Errorf("removed: %v", err)
	}
	if err := <-removed; err != nil {
		t.Error(err)
	}
}

func FuzzProofRecord(f *testing.F) {
	id := blockdev.Sum([]byte("diff"))
	f.Add([]byte(`{"version":1,"diffID":"` + id.String() + `","index":"` + blockdev.Sum(nil).String() + `","time":"2026-11-22T10:00:00Z"}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, err := decodeProof(b, id)
		if err != nil && !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%v is no ErrCorrupt", err)
		}
		if err == nil && (rec.Version != proofVersion || rec.DiffID != id || rec.Index == blockdev.Digest{}) {
			t.Errorf("%+v was taken", rec)
		}
	})
}
