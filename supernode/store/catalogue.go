package store

import (
	"slices"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// catalogue is what is known in memory of what is published: diffs and their layers, when
// they were used last, and which of them are pinned. Its lock is never held across I/O.
type catalogue struct {
	mu      sync.Mutex
	now     func() time.Time // of uses; tests give their own
	lastUse int64            // Unix nanoseconds; see useLocked
	diffs   map[blockdev.Digest]*diffState
	layers  map[blockdev.Digest]layerRecord
	pins    map[blockdev.Digest]int // diffs in use
}

// diffState is what is known in memory about a published diff.
type diffState struct {
	used   int64 // Unix nanoseconds of the last use
	dirty  bool  // used is newer than on disk
	layers []blockdev.Digest
}

func newCatalogue() *catalogue {
	return &catalogue{now: time.Now, diffs: map[blockdev.Digest]*diffState{}, layers: map[blockdev.Digest]layerRecord{}, pins: map[blockdev.Digest]int{}}
}

// record is a layer's record as it is on disk.
func (c *catalogue) record(layer blockdev.Digest) (layerRecord, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.layers[layer]
	return r, ok
}

// use is record, and counts as a use of the layer's diff.
func (c *catalogue) use(layer blockdev.Digest) (layerRecord, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.layers[layer]
	if ok {
		c.touchLocked(r.DiffID)
	}
	return r, ok
}

// touch counts as a use of a diff. False: there is no such diff.
func (c *catalogue) touch(diff blockdev.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.touchLocked(diff)
}

func (c *catalogue) touchLocked(diff blockdev.Digest) bool {
	st, ok := c.diffs[diff]
	if ok {
		st.used, st.dirty = c.useLocked(), true
	}
	return ok
}

// useLocked is when something is used: the time, but behind every use before. So a clock
// that was ahead for a while, and is put right, does not make what was used meanwhile
// the last to be evicted for as long.
func (c *catalogue) useLocked() int64 {
	c.lastUse = max(c.lastUse+1, c.now().UnixNano())
	return c.lastUse
}

// unwritten are the last uses, in Unix seconds, that are newer than on disk. They count as
// written from then on.
func (c *catalogue) unwritten() map[blockdev.Digest]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	uses := map[blockdev.Digest]int64{}
	for id, st := range c.diffs {
		if st.dirty {
			uses[id] = st.used / int64(time.Second)
			st.dirty = false
		}
	}
	return uses
}

// pin keeps a diff from being the victim until release is called, once or more often.
func (c *catalogue) pin(diff blockdev.Digest) (release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pins[diff]++
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.pins[diff]--; c.pins[diff] == 0 {
			delete(c.pins, diff)
		}
	})
}

// victim is the diff to evict next, and when it was used last; that is negative if all
// diffs are pinned.
func (c *catalogue) victim() (id blockdev.Digest, oldest int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	oldest = -1
	for d, st := range c.diffs {
		if c.pins[d] == 0 && (oldest < 0 || st.used < oldest) {
			id, oldest = d, st.used
		}
	}
	return id, oldest
}

// publish adds a layer and its diff, whose last use is now.
func (c *catalogue) publish(layer blockdev.Digest, r layerRecord) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if prev, ok := c.layers[layer]; ok && prev.DiffID != r.DiffID {
		if st := c.diffs[prev.DiffID]; st != nil {
			st.layers = slices.DeleteFunc(st.layers, func(d blockdev.Digest) bool { return d == layer })
		}
	}
	c.layers[layer] = r
	st := c.diffs[r.DiffID]
	if st == nil {
		st = &diffState{}
		c.diffs[r.DiffID] = st
	}
	st.used = c.useLocked()
	if !slices.Contains(st.layers, layer) {
		st.layers = append(st.layers, layer)
	}
}

// replace replaces the record of a layer that still is of the same diff.
func (c *catalogue) replace(layer blockdev.Digest, r layerRecord) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cur, ok := c.layers[layer]; ok && cur.DiffID == r.DiffID {
		c.layers[layer] = r
	}
}

// hidden is a diff that was taken out of sight.
type hidden struct {
	state  *diffState
	layers map[blockdev.Digest]layerRecord
}

// hide takes a diff and its layers out of sight. False: there is no such diff, or it is
// pinned and is not to go then.
func (c *catalogue) hide(id blockdev.Digest, unlessPinned bool) (hidden, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.diffs[id]
	if st == nil || unlessPinned && c.pins[id] > 0 {
		return hidden{}, false
	}
	delete(c.diffs, id)
	h := hidden{st, map[blockdev.Digest]layerRecord{}}
	for _, l := range st.layers {
		h.layers[l] = c.layers[l]
		delete(c.layers, l)
	}
	return h, true
}

// restore takes a hide back, unless the diff was published again since.
func (c *catalogue) restore(id blockdev.Digest, h hidden) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.diffs[id] == nil {
		c.diffs[id] = h.state
		for l, r := range h.layers {
			c.layers[l] = r
		}
	}
}

// forget makes the layers of a diff unknown, and returns them.
func (c *catalogue) forget(id blockdev.Digest) (layers []blockdev.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st := c.diffs[id]; st != nil {
		layers, st.layers = st.layers, nil
	}
	for _, l := range layers {
		delete(c.layers, l)
	}
	return layers
}

// isForgotten says that a diff has no layer: it is given to nobody any more, and is
// replaced as soon as its layer is fetched again.
func (c *catalogue) isForgotten(id blockdev.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.diffs[id]
	return st != nil && len(st.layers) == 0
}

// ids are all diffs.
func (c *catalogue) ids() []blockdev.Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := make([]blockdev.Digest, 0, len(c.diffs))
	for id := range c.diffs {
		ids = append(ids, id)
	}
	return ids
}

// sizes are how many there are.
func (c *catalogue) sizes() (diffs, layers, pins int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.diffs), len(c.layers), len(c.pins)
}

// Entry is a layer that is stored, as List has it.
type Entry struct {
	LayerRecord
	Used time.Time // when it was asked for last; zero if its diff is not here
}

// list returns all layers, in no order.
func (c *catalogue) list() []Entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Entry, 0, len(c.layers))
	for l, r := range c.layers {
		e := Entry{LayerRecord: r.public(l)}
		if d := c.diffs[r.DiffID]; d != nil {
			e.Used = time.Unix(0, d.used)
		}
		out = append(out, e)
	}
	return out
}
