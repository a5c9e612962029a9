package prefetch

import "testing"

func TestReadAheadGrowsWithSequentialReadsOnly(t *testing.T) {
	const least, most = 512, 2048
	var s Sequences
	steps := []struct {
		lo, end int
		want    int64
	}{
		{0, 10, 512},    // a first read
		{10, 20, 1024},  // reads on
		{100, 110, 512}, // another place
		{20, 40, 2048},  // the first reader is still known
		{40, 60, 2048},  // no further than most
		{110, 120, 1024},
		{50, 55, 512}, // within what was fetched: a jump
	}
	for i, st := range steps {
		got := s.Ahead(st.lo, least, most)
		if got != st.want {
			t.Errorf("step %d: read-ahead at chunk %d is %d, want %d", i, st.lo, got, st.want)
		}
		s.Note(st.end, got)
	}
}

func TestReadAheadForgetsOldSequences(t *testing.T) {
	var s Sequences
	for i := range 9 {
		s.Note(1000*i+1, 512)
	}
	if got := s.Ahead(1, 512, 2048); got != 512 {
		t.Errorf("the oldest of nine sequences is still known: %d", got)
	}
	if got := s.Ahead(1001, 512, 2048); got != 1024 {
		t.Errorf("the second oldest is forgotten: %d", got)
	}
}

func TestNoReadAheadStaysNone(t *testing.T) {
	var s Sequences
	s.Note(10, 0)
	if got := s.Ahead(10, 0, 2048); got != 0 {
		t.Errorf("got %d bytes of read-ahead though there is to be none", got)
	}
}
