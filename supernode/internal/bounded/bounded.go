// Package bounded keeps maps of times from growing without end.
package bounded

import "time"

// MakeRoom makes room for one more in a map that has most entries or more: it drops the
// oldest eighth of the time that they span, and returns their keys.
func MakeRoom[K comparable](m map[K]time.Time, most int) (dropped []K) {
	if len(m) < most {
		return nil
	}
	var lo, hi time.Time
	for _, t := range m {
		if lo.IsZero() || t.Before(lo) {
			lo = t
		}
		if t.After(hi) {
			hi = t
		}
	}
	cut := lo.Add(hi.Sub(lo) / 8)
	for k, t := range m {
		if !t.After(cut) {
			delete(m, k)
			dropped = append(dropped, k)
		}
	}
	return dropped
}
