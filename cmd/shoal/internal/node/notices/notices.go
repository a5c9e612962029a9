// Package notices remembers what has happened to a node's images lately, for programs
// that ask every few seconds. It holds a bounded number of notices and never waits: a
// source that is down can fail many reads.
package notices

import (
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/control"
)

const (
	// most are remembered, the newest ones.
	most = 256
	// again is how long the same makes no other notice.
	again = time.Minute
	// maxWhy bounds the text of one, in bytes: registries write some of it.
	maxWhy = 1 << 10
)

// event is a notice before it is known which images have its layer.
type event struct {
	control.Notice
	ref  string
	diff blockdev.Digest // zero: it is about ref
	// repeated counts what was the same and came within again.
	repeated int
}

// Notices is safe for concurrent use.
type Notices struct {
	now func() time.Time

	mu     sync.Mutex
	number uint64
	list   []event // the newest last
}

// New returns an empty list. Its numbers go on where those of an earlier process ended,
// since no process makes a million a second.
func New() *Notices { return newAt(time.Now) }

func newAt(now func() time.Time) *Notices {
	return &Notices{now: now, number: uint64(now().UnixMicro())}
}

// Image adds a notice about an image.
func (n *Notices) Image(what control.What, ref, cause, why string) {
	n.add(event{ref: ref, Notice: control.Notice{What: what, Cause: cause, Why: why}})
}

// Layer adds a notice about a diff.
func (n *Notices) Layer(what control.What, diff blockdev.Digest, why error) {
	n.add(event{diff: diff, Notice: control.Notice{What: what, Layer: diff.String(), Why: why.Error()}})
}

func (n *Notices) add(e event) {
	if len(e.Why) > maxWhy {
		e.Why = strings.ToValidUTF8(e.Why[:maxWhy], "") + " ..."
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	e.At = n.now().UTC()
	for i := len(n.list) - 1; i >= 0; i-- {
		o := &n.list[i]
		if o.What != e.What || o.ref != e.ref || o.diff != e.diff || o.Cause != e.Cause {
			continue
		}
		if e.At.Sub(o.At) < again {
			o.repeated++
			return
		}
		e.Before = o.repeated
		break
	}
	n.number++
	e.Number = n.number
	if len(n.list) == most {
		n.list = append(n.list[:0], n.list[1:]...)
	}
	n.list = append(n.list, e)
}

// After returns the notices after the one of this number, and the number of the newest.
// A number that is larger than that is another process's, before the clock was set back:
// then all are returned. refs returns the images that have a diff.
func (n *Notices) After(number uint64, refs func(blockdev.Digest) []string) ([]control.Notice, uint64) {
	n.mu.Lock()
	last := n.number
	if number > last {
		number = 0
	}
	var found []event
	for _, e := range n.list {
		if e.Number > number {
			found = append(found, e)
		}
	}
	n.mu.Unlock()
	list := make([]control.Notice, 0, len(found))
	for _, e := range found {
		e.Refs = []string{e.ref}
		if e.diff != (blockdev.Digest{}) {
			e.Refs = refs(e.diff)
		}
		list = append(list, e.Notice)
	}
	return list, last
}
