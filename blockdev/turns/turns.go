// Package turns shares something that is limited among keys, of which each may hold
// what it has for as long as it likes: requests to a source that does not answer
// are an example. A first-come, first-served limit would then belong to the one that
// does not answer, and everybody else would wait for it.
//
// # The rule
//
// A key may take more as long as it then has no more than what is left free. So one
// key alone gets half of the limit, k keys that take all they can get have the part
// 1/(k+1) each, and as much is free for the next key. A key that has nothing may
// always take once.
//
// # Invariants
//
//   - All keys together hold at most the limit, and beyond it only the first take of a
//     key, and what least allows.
//   - Takes of one key are granted in the order in which they came. Among keys, those
//     that wait have their turn one after the other, one take each.
//   - Somebody that gives back what it holds is the only thing that a take waits for. If
//     all takes of the own key are given back, the next one of that key is granted,
//     whatever other keys do.
package turns

import (
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

// Turns is one limited thing. Its methods may be called from several goroutines.
type Turns struct {
	limit, least int64

	mu   sync.Mutex
	used int64
	line int64 // takes that wait
	keys map[blockdev.Digest]*line
	// waiting are the lines that have somebody in them; next is whose turn it is.
	waiting []*line
	next    int
}

// line is what one key holds, and its takes that wait.
type line struct {
	used        int64
	first, last *take
}

type take struct {
	n     int64
	start func()
	next  *take
}

// New shares limit units. A key may always have least of them, however much others hold.
func New(limit, least int64) *Turns {
	return &Turns{limit: limit, least: least, keys: make(map[blockdev.Digest]*line)}
}

// fits says whether a key may take n more; mu is held.
func (t *Turns) fits(l *line, n int64) bool {
	has := l.used + n
	return l.used == 0 || has <= t.least || has <= t.limit-t.used
}

// of returns the line of a key; mu is held.
func (t *Turns) of(key blockdev.Digest) *line {
	l := t.keys[key]
	if l == nil {
		l = &line{}
		t.keys[key] = l
	}
	return l
}

// try takes n at once if nobody of the key waits and it fits; mu is held.
func (t *Turns) try(l *line, n int64) bool {
	if l.first != nil || !t.fits(l, n) {
		return false
	}
	l.used += n
	t.used += n
	return true
}

// Try takes n for a key if that needs no waiting, and says whether it did. The caller
// gives them back by Give.
func (t *Turns) Try(key blockdev.Digest, n int64) bool {
	if n == 0 {
		return true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.try(t.of(key), n) // no line is left over: a key that has nothing may take
}

// Take takes n for a key and returns when it has them, and whether it had to wait. The
// caller gives them back by Give.
func (t *Turns) Take(key blockdev.Digest, n int64) (waited bool) {
	if n == 0 {
		return false // nothing holds no line open: another's Give may end it
	}
	t.mu.Lock()
	l := t.of(key)
	if t.try(l, n) {
		t.mu.Unlock()
		return false
	}
	granted := make(chan struct{})
	t.enqueue(l, n, func() { close(granted) })
	t.mu.Unlock()
	<-granted
	return true
}

// Start takes n for a key and calls start when it has them, at once or later: in the
// caller's goroutine, or in that of the caller that gives back. start must not wait and must
// not use t. All that it starts gives back by Give.
func (t *Turns) Start(key blockdev.Digest, n int64, start func()) {
	if n == 0 {
		start()
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.of(key)
	if t.try(l, n) {
		start()
		return
	}
	t.enqueue(l, n, start)
}

// enqueue puts a take at the end of its line; mu is held.
func (t *Turns) enqueue(l *line, n int64, start func()) {
	e := &take{n: n, start: start}
	if l.first == nil {
		l.first = e
		t.waiting = append(t.waiting, l)
	} else {
		l.last.next = e
	}
	l.last = e
	t.line++
}

// Use returns what all keys hold, and how many takes wait.
func (t *Turns) Use() blockdev.Use {
	t.mu.Lock()
	defer t.mu.Unlock()
	return blockdev.Use{Used: t.used, Waiting: t.line, Capacity: t.limit}
}

// Give gives back n that a key has taken, and grants what fits now.
func (t *Turns) Give(key blockdev.Digest, n int64) {
	if n == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.keys[key]
	l.used -= n
	t.used -= n
	t.grant()
	if l.used == 0 && l.first == nil {
		delete(t.keys, key)
	}
}

// Keys returns how many keys have taken something, or wait to.
func (t *Turns) Keys() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.keys)
}

// grant goes around the lines that wait until none of their first takes fits; mu is
// held.
func (t *Turns) grant() {
	for passed := 0; passed < len(t.waiting); {
		if t.next >= len(t.waiting) {
			t.next = 0
		}
		l := t.waiting[t.next]
		e := l.first
		if !t.fits(l, e.n) {
			passed++
			t.next++
			continue
		}
		passed = 0
		t.line--
		l.used += e.n
		t.used += e.n
		if l.first = e.next; l.first == nil {
			t.waiting = slices.Delete(t.waiting, t.next, t.next+1)
		} else {
			t.next++
		}
		e.start()
	}
}
