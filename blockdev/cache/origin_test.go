package cache

import (
	"context"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// toldMemory keeps where the bytes of a read have come from.
type toldMemory struct{ from blockdev.Origin }

func (m *toldMemory) Take(_ context.Context, n int, from blockdev.Origin) ([]byte, error) {
	m.from = from
	return make([]byte, n), nil
}

func (*toldMemory) Give() {}

// A read is told of the farthest place that one of its chunks has come from; what is
// here is local, whoever has brought it.
func TestOrigin(t *testing.T) {
	r := newRig(t, 4<<20, func(c *Config) { c.ReadAhead, c.MaxReadAhead = 1, 1 })
	chunks := r.ix.Chunks
	far := chunks[3].Offset
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		return r.mem.Fetch(ctx, req, func(i int, b []byte) error {
			from := blockdev.FromPeer
			if req.Chunks[i].Offset == far {
				from = blockdev.FromRegistry
			}
			req.Comes(from)
			return deliver(i, b)
		})
	})
	read := func(first, last int, want blockdev.Origin) {
		t.Helper()
		var m toldMemory
		off := chunks[first].Offset
		n := chunks[last].Offset + int64(chunks[last].Length) - off
		if _, err := r.d.Read(t.Context(), off, int(n), &m); err != nil || m.from != want {
			t.Errorf("chunks %d to %d come from %v, %v; want %v", first, last, m.from, err, want)
		}
	}
	read(0, 0, blockdev.FromPeer)
	read(2, 4, blockdev.FromRegistry)
	r.checkRead(0, int(chunks[5].Offset)) // number 1 may have been read ahead or not
	read(0, 4, blockdev.FromLocal)
}
