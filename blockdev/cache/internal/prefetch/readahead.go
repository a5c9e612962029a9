package prefetch

// Sequences tells programs that read on from those that jump, in one diff: a
// read that misses where the last request ended gets twice that request's
// read-ahead, any other the least. It is small, so that what it forgets is cheap
// too, and has no lock of its own.
type Sequences struct {
	recent [8]sequence
	next   int // the one to forget
}

// sequence is one request: the chunk number behind its last one, and its
// read-ahead in bytes. The zero value is none.
type sequence struct {
	end   int
	ahead int64
}

// Ahead returns the read-ahead, in bytes, of a request for chunks that begin at
// number lo.
func (s *Sequences) Ahead(lo int, least, most int64) int64 {
	for i, q := range s.recent {
		if q.ahead > 0 && q.end == lo {
			s.recent[i] = sequence{}
			s.next = i
			return min(2*q.ahead, max(most, least))
		}
	}
	return least
}

// Note remembers the request that ahead was asked for.
func (s *Sequences) Note(end int, ahead int64) {
	s.recent[s.next] = sequence{end, ahead}
	s.next = (s.next + 1) % len(s.recent)
}
