package blockdev

import (
	"errors"
	"slices"
	"testing"
)

func TestRest(t *testing.T) {
	data := [][]byte{[]byte("a"), []byte("bb"), []byte("ccc"), []byte("dddd")}
	req := Request{Priority: Demand, Hops: 3}
	for _, d := range data {
		req.Chunks = append(req.Chunks, Chunk{Length: uint32(len(d)), Digest: Sum(d)})
	}
	var delivered []int
	var full error
	rest := NewRest(req, func(i int, d []byte) error {
		if full != nil {
			return full
		}
		if err := req.Chunks[i].Check(d); err != nil {
			return err
		}
		delivered = append(delivered, i)
		return nil
	})
	first, take := rest.Ask()
	if !slices.Equal(first.Chunks, req.Chunks) || first.Priority != Demand || first.Hops != 3 {
		t.Fatalf("asks for %+v", first)
	}
	for _, step := range []struct {
		k    int
		data []byte
		want error
	}{{1, data[1], nil}, {2, data[0], ErrCorrupt}, {1, data[1], nil}, {1, data[0], ErrCorrupt}, {3, data[3], nil}} {
		if err := take(step.k, step.data); !errors.Is(err, step.want) {
			t.Errorf("chunk %d: %v, want %v", step.k, err, step.want)
		}
	}
	for _, k := range []int{-1, 4} {
		if err := take(k, data[0]); err == nil || errors.Is(err, ErrCorrupt) {
			t.Errorf("chunk %d of 4: %v", k, err)
		}
	}
	if rest.Left() != 2 || rest.Refused() != nil {
		t.Errorf("%d are left, %v", rest.Left(), rest.Refused())
	}

	// The next source is asked for the rest, while the first one is slow.
	second, other := rest.Ask()
	if !slices.Equal(second.Chunks, []Chunk{req.Chunks[0], req.Chunks[2]}) {
		t.Fatalf("asks for %+v", second.Chunks)
	}
	if err := errors.Join(other(1, data[2]), take(2, data[2])); err != nil {
		t.Error(err)
	}
	if !slices.Equal(delivered, []int{1, 3, 2}) {
		t.Errorf("delivered %v", delivered)
	}

	// The caller's own error ends the request for all sources.
	full = errors.New("the disk is full")
	if err := other(0, data[0]); !errors.Is(err, full) {
		t.Error(err)
	}
	full = nil
	if err := take(0, data[0]); !errors.Is(err, rest.Refused()) || rest.Refused() == nil || rest.Left() != 1 {
		t.Errorf("%v, %v, %d left", err, rest.Refused(), rest.Left())
	}
}
