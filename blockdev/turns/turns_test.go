package turns

import (
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

func key(n byte) blockdev.Digest { return blockdev.Digest{n} }

// granted starts takes of 1 and returns how many of them were granted.
func granted(t *Turns, k blockdev.Digest, n int) (got int) {
	for range n {
		t.Start(k, 1, func() { got++ })
	}
	return got
}

// A key that holds all it can get, for ever, leaves as much for others.
func TestShare(t *testing.T) {
	tn := New(120, 1)
	for _, c := range []struct{ want, free int }{{60, 60}, {30, 30}, {15, 15}} {
		if got := granted(tn, key(byte(c.want)), 1000); got != c.want {
			t.Errorf("a key got %d of what was free, want %d", got, c.want)
		}
		if free := int(tn.limit - tn.used); free != c.free {
			t.Errorf("%d are free for others, want %d", free, c.free)
		}
	}
	if u := tn.Use(); u != (blockdev.Use{Used: 105, Waiting: 3000 - 105, Capacity: 120}) {
		t.Errorf("in use: %+v", u)
	}
	for range 60 {
		tn.Give(key(60), 1)
	}
	if u := tn.Use(); u.Used+u.Waiting != 3000-60 {
		t.Errorf("in use after 60 were given back: %+v", u)
	}
}

// However many keys hold on to what they have, each key that comes gets its least.
func TestLeast(t *testing.T) {
	tn := New(8, 4)
	for i := range byte(100) {
		if got := granted(tn, key(i), 10); got < 4 {
			t.Fatalf("key %d got %d, want 4 at least", i, got)
		}
	}
}

// A key with nothing may take more than there is at all: it waits for nobody.
func TestLarge(t *testing.T) {
	tn := New(10, 0)
	if tn.Take(key(1), 100) || !tn.Try(key(2), 100) {
		t.Fatal("the first take of a key had to wait")
	}
	if tn.Try(key(1), 1) {
		t.Fatal("a second take was granted beyond the limit")
	}
	tn.Give(key(1), 100)
	tn.Give(key(2), 100)
	if len(tn.keys) != 0 || tn.used != 0 {
		t.Fatalf("%d keys and %d units are left over", len(tn.keys), tn.used)
	}
}

// What is given back goes to the keys that wait in turns, and within a key in order.
func TestOrder(t *testing.T) {
	tn := New(2, 0)
	var order []int
	for _, k := range []byte{1, 2} {
		for i := range 3 {
			tn.Start(key(k), 1, func() { order = append(order, int(k)*10+i) })
		}
	}
	// Each key has its first; nothing more fits. Now one after the other ends.
	for i := range 4 {
		if len(order) != 2+i {
			t.Fatalf("%d takes granted before the %dth was given back: %v", len(order), i+1, order)
		}
		tn.Give(key(byte(order[i]/10)), 1)
	}
	want := []int{10, 20, 11, 21, 12, 22}
	for i := range want {
		if order[i] != want[i] {
			t.Fatalf("granted in the order %v, want %v", order, want)
		}
	}
}

// Takes do not overtake others of their key, even if they would fit.
func TestNoOvertaking(t *testing.T) {
	tn := New(10, 0)
	tn.Take(key(1), 4)
	large := false
	tn.Start(key(1), 3, func() { large = true })
	if large || tn.Try(key(1), 1) {
		t.Fatal("the small take went before the large one that waits")
	}
	tn.Give(key(1), 4)
	if !large {
		t.Fatal("the large take still waits")
	}
}

// Under load everything that waits is granted in the end, and nothing is lost.
func TestEverybodyIsServed(t *testing.T) {
	const limit, most = 20, 7
	tn := New(limit, 2)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for range 200 {
				k, n := key(byte(rng.IntN(5))), 1+rng.Int64N(most)
				if rng.IntN(4) > 0 {
					tn.Take(k, n)
				} else if !tn.Try(k, n) {
					continue
				}
				tn.mu.Lock()
				if tn.used > limit+5*most {
					t.Errorf("%d in use", tn.used)
				}
				tn.mu.Unlock()
				tn.Give(k, n)
			}
		})
	}
	wg.Wait()
	if len(tn.keys) != 0 || tn.Use() != (blockdev.Use{Capacity: limit}) || len(tn.waiting) != 0 {
		t.Fatalf("%d keys, %d units, %d lines are left over", len(tn.keys), tn.used, len(tn.waiting))
	}
}

// TestNothing: who takes nothing gives back nothing, also when the others of the key have
// given back all.
func TestNothing(t *testing.T) {
	u, key := New(10, 2), blockdev.Sum([]byte("a"))
	if u.Take(key, 0) || !u.Try(key, 0) {
		t.Error("nothing waits")
	}
	u.Take(key, 5)
	u.Give(key, 5)
	u.Give(key, 0)
	if n := u.Keys(); n != 0 {
		t.Errorf("%d keys are left", n)
	}
}
