package roster

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/p2p/host"
)

// TestRevokedAtOnce: of revocations, and what takes them back, that come at a time none
// is lost.
func TestRevokedAtOnce(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "revoked")
		r, err := openRevoked(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.set(host.FromKey([32]byte{200}), true); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				id, in := host.FromKey([32]byte{byte(i)}), true
				if i == 4 {
					id, in = host.FromKey([32]byte{200}), false
				}
				if err := r.set(id, in); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		again, err := openRevoked(path)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(again.list()); n != 4 || again.has(host.FromKey([32]byte{200})) {
			t.Fatalf("%d identities are in the file, want 4", n)
		}
	}
}

// TestMerge: of what two supernodes have done the latest counts on both, in whatever
// order they hear of it, and after a restart.
func TestMerge(t *testing.T) {
	a, b := filepath.Join(t.TempDir(), "revoked"), filepath.Join(t.TempDir(), "revoked")
	open := func(path string) *revoked {
		t.Helper()
		r, err := openRevoked(path)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	ra, rb := open(a), open(b)
	rb.now = func() time.Time { return time.Unix(1, 0) } // its clock is wrong
	x, y := host.FromKey([32]byte{1}), host.FromKey([32]byte{2})
	do := func(r *revoked, id peer.ID, in bool) {
		t.Helper()
		if err := r.set(id, in); err != nil {
			t.Fatal(err)
		}
	}
	exchange := func(added int) {
		t.Helper()
		all, _ := ra.all()
		got, err := rb.merge(all)
		if err != nil || len(got) != added {
			t.Errorf("revoked by the other one: %v, %v", got, err)
		}
		all, _ = rb.all()
		if _, err := ra.merge(all); err != nil {
			t.Error(err)
		}
	}
	want := func(when string, x0, y0 bool) {
		t.Helper()
		for _, r := range []*revoked{ra, rb, open(a), open(b)} {
			if r.has(x) != x0 || r.has(y) != y0 {
				t.Errorf("%s: %v %v", when, r.has(x), r.has(y))
			}
		}
	}
	do(ra, x, true)
	do(rb, y, true)
	exchange(1)
	want("both revoked", true, true)
	do(rb, x, false) // later, though its clock is behind
	exchange(0)
	want("allowed again", false, true)
	do(ra, x, true)
	do(ra, y, false)
	exchange(1)
	want("the other way", true, false)
	// The list was changed by hand.
	if err := os.WriteFile(a, []byte(y.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ra = open(a)
	exchange(1)
	want("by hand", false, true)
}
