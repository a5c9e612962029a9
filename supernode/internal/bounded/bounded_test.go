package bounded

import (
	"testing"
	"time"
)

// TestMakeRoom: a map stays as small as it has to, and what is newest stays in it.
func TestMakeRoom(t *testing.T) {
	const most = 1 << 10
	m := map[int]time.Time{}
	now := time.Now()
	gone := 0
	for i := range most * 2 {
		gone += len(MakeRoom(m, most))
		m[i] = now.Add(time.Duration(i))
	}
	if len(m) > most || gone+len(m) != 2*most {
		t.Errorf("%d entries, %d are said to be gone", len(m), gone)
	}
	if _, ok := m[most*2-1]; !ok {
		t.Error("the newest entry is gone")
	}
}
