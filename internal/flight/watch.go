package flight

import "sync"

// Progress is how far work is, for its watchers; the zero value is ready. All
// methods may be called from any goroutine.
type Progress[P any] struct {
	mu       sync.Mutex
	told     bool
	last     P
	watchers map[*func(P)]struct{}
}

// Report tells all watchers, from this goroutine.
func (w *Progress[P]) Report(p P) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told, w.last = true, p
	for f := range w.watchers {
		(*f)(p)
	}
}

// Watch has f called with what was reported last, if anything was, and then with
// each report until end is called. Calls come one at a time, and none after end
// has returned. f must not block: the work waits for it.
func (w *Progress[P]) Watch(f func(P)) (end func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.told {
		f(w.last)
	}
	if w.watchers == nil {
		w.watchers = map[*func(P)]struct{}{}
	}
	w.watchers[&f] = struct{}{}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.watchers, &f)
	}
}
