package lru

import "testing"

// TestNew: the entry that was touched longest ago makes room, and its owner learns it.
func TestNew(t *testing.T) {
	var gone []string
	m := NewEvict(2, func(k string, _ int) { gone = append(gone, k) })
	m.Add("a", 1)
	m.Add("b", 2)
	m.Get("a")
	m.Add("c", 3)
	if len(gone) != 1 || gone[0] != "b" || m.Len() != 2 || !m.Contains("a") {
		t.Errorf("gone: %v, here: %v", gone, m.Keys())
	}
	all := Unbounded[int, int](nil)
	for i := range 1000 {
		all.Add(i, i)
	}
	if all.Len() != 1000 {
		t.Errorf("%d entries", all.Len())
	}
}
