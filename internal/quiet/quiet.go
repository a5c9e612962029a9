// Package quiet keeps logs short where others decide how much there is to say: what
// repeats is said once a minute, and there are a few lines a minute of each kind,
// however many names its causes have.
package quiet

import (
	"sync"
	"time"

	"github.com/shoalfs/shoal/internal/lru"
)

const (
	// every is how long the same is not said again.
	every = time.Minute
	// maxLines is how many lines of one kind there are in that time.
	maxLines = 10
	// maxNames bounds what is remembered, of all kinds together.
	maxNames = 4096
)

// Quiet says what is to be logged. The zero value is ready. It may be used from
// several goroutines.
type Quiet struct {
	mu    sync.Mutex
	names *lru.Map[name, *said]
	kinds map[string]*window
}

type name struct{ kind, who string }

// said is what was said of one name.
type said struct {
	at     time.Time
	others int // that were not, since
}

// window is a minute of one kind.
type window struct {
	began  time.Time
	lines  int
	others int // of further names, since the last line
}

// Say says whether it is time to log something of a kind (one of a few) about the one that
// causes it, and how many such lines were left out since the last one.
func (q *Quiet) Say(kind, who string, now time.Time) (others int, say bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.names == nil {
		q.names, q.kinds = lru.New[name, *said](maxNames), map[string]*window{}
	}
	key := name{kind, who}
	s, _ := q.names.Peek(key)
	if s != nil && now.Sub(s.at) < every {
		s.others++
		return 0, false
	}
	w := q.kinds[kind]
	switch {
	case w == nil:
		w = &window{began: now}
		q.kinds[kind] = w
	case now.Sub(w.began) >= every:
		w.began, w.lines = now, 0
	}
	if w.lines >= maxLines {
		w.others++
		return 0, false
	}
	w.lines++
	others, w.others = w.others, 0
	if s != nil {
		others += s.others
	}
	q.names.Add(key, &said{at: now})
	return others, true
}
