package quiet

import (
	"fmt"
	"testing"
	"time"
)

// One that repeats is said once a minute, with how often it was not.
func TestRepeats(t *testing.T) {
	var q Quiet
	now := time.Unix(1e9, 0)
	for i := range 100 {
		if others, say := q.Say("stranger", "a", now.Add(time.Duration(i)*time.Millisecond)); say != (i == 0) || others != 0 {
			t.Fatalf("%d: %v, %d others", i, say, others)
		}
	}
	if others, say := q.Say("stranger", "a", now.Add(time.Minute)); !say || others != 99 {
		t.Errorf("after a minute: %v, %d others", say, others)
	}
}

// Names are free: ever new ones get no more lines, and another kind has its own.
func TestNamesAreFree(t *testing.T) {
	var q Quiet
	lines, left := 0, 0
	now := time.Unix(1e9, 0)
	const names = 100_000
	for i := range names { // within ten minutes
		others, say := q.Say("stranger", fmt.Sprint(i), now.Add(time.Duration(i)*10*time.Minute/names))
		if say {
			lines++
			left += others
		}
	}
	if lines != 10*maxLines {
		t.Errorf("%d lines in ten minutes, want %d", lines, 10*maxLines)
	}
	if missing := names - lines - left; missing < 0 || missing > names/10 {
		t.Errorf("%d lines say that %d were left out, of %d", lines, left, names)
	}
	if q.names.Len() > maxNames {
		t.Errorf("%d names are remembered", q.names.Len())
	}
	if _, say := q.Say("token", "0", now.Add(10*time.Minute)); !say {
		t.Error("another kind is not said")
	}
}
