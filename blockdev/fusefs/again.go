package fusefs

import (
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	// againWithin is how soon after a read has failed another one of the same bytes is
	// taken for the kernel's second try, and how much longer than the first that one
	// may take.
	againWithin = time.Second
	// againBlock is what "the same bytes" are compared by, about a chunk.
	againBlock = 64 << 10
	// againMost bounds what is remembered.
	againMost = 1 << 16
)

// secondTries knows which reads have failed a moment ago. When a read of the page cache
// fails, the kernel asks again for the page that a process waits for, and gives the
// process EIO only when that fails, too. The process waits for both, so the second try
// has the deadline of the first. The zero value is ready.
type secondTries struct {
	mu sync.Mutex
	// Two generations, of againWithin each: what is older is forgotten with its map.
	now, before map[failedBlock]failedTry
	since       time.Time // that now is filled
}

type failedBlock struct {
	id    blockdev.Digest
	block int64
}

type failedTry struct{ deadline, failed time.Time }

// turn makes room for a new generation; mu is held.
func (t *secondTries) turn(now time.Time) {
	if now.Sub(t.since) < againWithin {
		return
	}
	t.before, t.now = t.now, nil
	if now.Sub(t.since) >= 2*againWithin {
		t.before = nil
	}
	t.since = now
}

// note remembers a read that has failed now. A second try is not remembered, so that
// a read that is tried again gets the whole time.
func (t *secondTries) note(r slowRead, now time.Time) {
	if r.second {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now)
	if t.now == nil {
		t.now = make(map[failedBlock]failedTry)
	}
	for b := r.off / againBlock; b <= (r.off+int64(r.n)-1)/againBlock && len(t.now) < againMost; b++ {
		t.now[failedBlock{r.id, b}] = failedTry{r.deadline, now}
	}
}

// deadline returns until when a read that comes now may wait, and whether it is a second
// try; usual is for those that are not.
func (t *secondTries) deadline(id blockdev.Digest, off int64, now, usual time.Time) (at time.Time, second bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.turn(now)
	k := failedBlock{id, off / againBlock}
	f, ok := t.now[k]
	if !ok {
		f, ok = t.before[k]
	}
	if !ok || now.Sub(f.failed) >= againWithin {
		return usual, false
	}
	if at = f.failed.Add(againWithin); f.deadline.After(at) {
		at = f.deadline
	}
	if usual.Before(at) {
		return usual, false
	}
	return at, true
}
