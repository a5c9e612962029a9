package store

import (
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// sessions are the ingests that run. They, and runs of recompression, take the ids of new
// packs from here, until the store is closed.
type sessions struct {
	mu       sync.Mutex
	closed   bool
	nextPack uint64
	running  map[*Ingest]struct{}
	ended    time.Time // when the last one has, or Open
}

func newSessions() *sessions {
	return &sessions{running: map[*Ingest]struct{}{}, ended: time.Now()}
}

// newPack returns the id of a new pack. The error is ErrClosed.
func (s *sessions) newPack() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, ErrClosed
	}
	s.nextPack++
	return s.nextPack - 1, nil
}

func (s *sessions) enter(in *Ingest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running[in] = struct{}{}
}

func (s *sessions) leave(in *Ingest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, in)
	s.ended = time.Now()
}

// count is how many run, and when the last one has ended.
func (s *sessions) count() (n int, ended time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.running), s.ended
}

// any says whether one runs.
func (s *sessions) any() bool {
	n, _ := s.count()
	return n > 0
}

// find is find of the session that has put a chunk.
func (s *sessions) find(d blockdev.Digest) (chunkRecord, []byte, bool) {
	s.mu.Lock()
	var open [8]*Ingest // no allocation for the usual few
	list := open[:0]
	for in := range s.running {
		list = append(list, in)
	}
	s.mu.Unlock()
	for _, in := range list {
		if r, data, ok := in.find(d); ok {
			return r, data, true
		}
	}
	return chunkRecord{}, nil, false
}

// close ends the giving of packs, and returns those that run. False: it was called before.
func (s *sessions) close() (open []*Ingest, first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false
	}
	s.closed = true
	for in := range s.running {
		open = append(open, in)
	}
	return open, true
}
