package images

import (
	"slices"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// fetching are the diffs that the data path was asked to fetch, less those that it
// was told to leave.
type fetching struct {
	on   map[blockdev.Digest]bool
	here map[blockdev.Digest]bool
}

func (f *fetching) Incomplete(id blockdev.Digest) bool { return !f.here[id] }

func (f *fetching) Prefetch(ids ...blockdev.Digest) {
	for _, id := range ids {
		f.on[id] = true
	}
}

func (f *fetching) StopPrefetch(ids ...blockdev.Digest) {
	for _, id := range ids {
		delete(f.on, id)
	}
}

// TestWishes: what is fetched, and when the wishes are looked at again.
func TestWishes(t *testing.T) {
	a, b := blockdev.Sum([]byte("a")), blockdev.Sum([]byte("b"))
	now := time.Now()
	old := now.Add(-time.Hour)
	all := []blockdev.Digest{a, b}
	only := all[:1]
	ids := func(ids ...string) map[string]struct{} {
		m := make(map[string]struct{})
		for _, id := range ids {
			m[id] = struct{}{}
		}
		return m
	}
	for _, tt := range []struct {
		name      string
		do        func(*wishes)
		running   map[string]struct{}
		here      []blockdev.Digest
		afterExit bool
		want      []blockdev.Digest
		next      time.Duration
	}{
		{"runs", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids("1"), nil, false, all, wishInterval},
		{"begins", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: now}) }, ids(), nil, false, all, wishInterval},
		{"never began", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids(), nil, false, nil, 0},
		{"has ended", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: now, ran: true}) }, ids(), nil, false, nil, 0},
		{"has ended, and is wanted still", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids(), nil, true, all, wishInterval},
		{"mounts are not known", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, nil, nil, false, all, wishInterval},
		{"a view", func(w *wishes) { w.start("k", container{id: "1", view: true, diffs: all, since: old}) }, ids(), nil, false, all, wishInterval},
		{"is removed", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: now})
			w.end("k")
		}, ids("1"), nil, false, nil, 0},
		{"is removed, and is wanted still", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: now})
			w.end("k")
		}, ids(), nil, true, all, wishInterval},
		{"is removed, and is here", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: now})
			w.end("k")
		}, ids(), all, true, nil, 0},
		{"another shares a layer", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: old})
			w.start("l", container{id: "2", diffs: only, since: old})
		}, ids("2"), nil, false, only, wishInterval},
		{"is complete", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids("1"), all, false, nil, 0},
		{"half is here", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids("1"), all[1:], false, only, wishInterval},
		{"found running", func(w *wishes) { w.found("k", container{id: "1", diffs: all, since: old}) }, ids("1"), nil, false, all, wishInterval},
		{"found ended", func(w *wishes) { w.found("k", container{id: "1", diffs: all, since: old}) }, ids(), nil, false, nil, 0},
		{"found, may begin", func(w *wishes) { w.found("k", container{id: "1", diffs: all, since: now}) }, ids(), nil, false, nil, wishInterval},
		{"found is older than started", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: now})
			w.found("k", container{id: "1", diffs: all, since: old})
		}, ids(), nil, false, all, wishInterval},
		{"pulled", func(w *wishes) { w.pull("i", pulled{all, now.Add(time.Second)}) }, ids(), nil, false, nil, time.Second},
		{"pulled before", func(w *wishes) { w.pull("i", pulled{all, now}) }, ids(), nil, false, all, wishInterval},
		{"pulled, and is here", func(w *wishes) { w.pull("i", pulled{all, now}) }, ids(), all, false, nil, 0},
		{"pulled and followed", func(w *wishes) {
			w.pull("i", pulled{all, now})
			w.follow("i")
		}, ids(), nil, false, nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &fetching{on: make(map[blockdev.Digest]bool), here: make(map[blockdev.Digest]bool)}
			for _, id := range tt.here {
				f.here[id] = true
			}
			w := newWishes(f, tt.afterExit)
			tt.do(w)
			for range 2 { // the second look changes nothing
				if next := w.review(now, tt.running); next != tt.next {
					t.Errorf("looks again in %v, want %v", next, tt.next)
				}
				for _, id := range all {
					if got, want := f.on[id] && !f.here[id], slices.Contains(tt.want, id); got != want {
						t.Errorf("diff %v is fetched: %v, want %v", id, got, want)
					}
				}
			}
		})
	}
}
