package notices

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/control"
)

func TestNotices(t *testing.T) {
	now := time.Unix(1000, 0)
	n := newAt(func() time.Time { return now })
	a, b := blockdev.Sum([]byte("a")), blockdev.Sum([]byte("b"))
	refs := func(d blockdev.Digest) []string { return map[blockdev.Digest][]string{a: {"one", "two"}, b: nil}[d] }

	none, first := n.After(0, refs)
	if len(none) != 0 || none == nil {
		t.Errorf("at the start: %#v", none)
	}
	n.Image(control.Lazy, "r/one", "", "")
	n.Image(control.Unpacked, "r/two", "slow", strings.Repeat("x", 2*maxWhy))
	n.Layer(control.ReadFailed, a, errors.New("no source"))
	n.Layer(control.Quarantined, b, errors.New("other bytes"))
	list, last := n.After(first, refs)
	if len(list) != 4 || last != first+4 || list[3].Number != last {
		t.Fatalf("%d: %+v", last, list)
	}
	if !reflect.DeepEqual(list[0], control.Notice{Number: first + 1, At: now.UTC(), What: control.Lazy, Refs: []string{"r/one"}}) {
		t.Errorf("%+v", list[0])
	}
	if list[1].Cause != "slow" || len(list[1].Why) > maxWhy+10 {
		t.Errorf("%+v", list[1])
	}
	if !reflect.DeepEqual(list[2].Refs, []string{"one", "two"}) || list[2].Layer != a.String() || list[2].Why != "no source" {
		t.Errorf("%+v", list[2])
	}

	// The same within a minute is counted, and said with the next one.
	for range 10 {
		n.Layer(control.ReadFailed, a, errors.New("no source"))
	}
	if again, _ := n.After(last, refs); len(again) != 0 {
		t.Errorf("the same again: %+v", again)
	}
	now = now.Add(again)
	n.Layer(control.ReadFailed, a, errors.New("no source"))
	if again, _ := n.After(last, refs); len(again) != 1 || again[0].Before != 10 {
		t.Errorf("after a minute: %+v", again)
	}

	// Bounded: the newest are remembered.
	for i := range 2 * most {
		n.Image(control.Lazy, fmt.Sprint(i), "", "")
	}
	all, last := n.After(0, refs)
	if len(all) != most || all[most-1].Refs[0] != fmt.Sprint(2*most-1) || all[most-1].Number != last {
		t.Errorf("%d notices", len(all))
	}

	// The next process's numbers are larger. If the clock was set back, then nothing is lost.
	now = now.Add(time.Second)
	next := newAt(func() time.Time { return now })
	next.Image(control.Lazy, "r/one", "", "")
	if got, _ := next.After(last, refs); len(got) != 1 {
		t.Errorf("of the next process: %+v", got)
	}
	now = time.Unix(10, 0)
	next = newAt(func() time.Time { return now })
	next.Image(control.Lazy, "r/one", "", "")
	if got, _ := next.After(last, refs); len(got) != 1 {
		t.Errorf("after the clock was set back: %+v", got)
	}
}
