package blockdev

import (
	"errors"
	"testing"
)

func TestCheck(t *testing.T) {
	data := []byte("the bytes of a chunk")
	c := Chunk{Length: uint32(len(data)), Digest: Sum(data)}
	p := Piece{Length: c.Length, Digest: c.Digest}
	for _, tt := range []struct {
		name string
		data []byte
		want error
	}{
		{"right", data, nil},
		{"short", data[:10], ErrCorrupt},
		{"nothing", nil, ErrCorrupt},
		{"other bytes", []byte("the bytes of a chunK"), ErrCorrupt},
	} {
		if err := c.Check(tt.data); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if err := p.Check(tt.data); !errors.Is(err, tt.want) {
			t.Errorf("%s, piece: %v", tt.name, err)
		}
	}
	// The index may lie about a length: the digest alone is not enough.
	c.Length--
	if err := c.Check(data); !errors.Is(err, ErrCorrupt) {
		t.Errorf("longer than the index says: %v", err)
	}
	c.Length++
	if n := testing.AllocsPerRun(10, func() {
		if c.Check(data) != nil {
			t.Fail()
		}
	}); n != 0 {
		t.Errorf("a check allocates %v times", n)
	}
}
