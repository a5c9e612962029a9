package layer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is where chunks and pieces go in tests.
type memory struct {
	mu   sync.Mutex
	data map[blockdev.Digest][]byte
}

func newMemory() *memory { return &memory{data: map[blockdev.Digest][]byte{}} }

func (m *memory) put(_ context.Context, d blockdev.Digest, data []byte) error {
	if blockdev.Sum(data) != d || len(data) == 0 || len(data) > blockdev.MaxChunk {
		return fmt.Errorf("%d bytes that are not %v", len(data), d)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.data[d] == nil {
		m.data[d] = bytes.Clone(data)
	}
	return nil
}

func (m *memory) piece(_ context.Context, p blockdev.Piece) ([]byte, error) {
	if b := m.data[p.Digest]; b != nil {
		return b, nil
	}
	return nil, blockdev.ErrNotFound
}

// masked assembles the masked diff and checks the chunk table on the way.
func (m *memory) masked(ix *blockdev.Index) ([]byte, error) {
	var b []byte
	for i, c := range ix.Chunks {
		data := m.data[c.Digest]
		if c.Offset != int64(len(b)) || int(c.Length) != len(data) || len(data) > blockdev.MaxChunk ||
			len(data) < blockdev.MinChunk && i < len(ix.Chunks)-1 {
			return nil, fmt.Errorf("chunk %d of %d: %d bytes at %d, wanted %d there, have %d",
				i, len(ix.Chunks), c.Length, c.Offset, len(b), len(data))
		}
		b = append(b, data...)
	}
	if int64(len(b)) != ix.DiffSize {
		return nil, fmt.Errorf("chunks cover %d bytes of %d", len(b), ix.DiffSize)
	}
	return b, nil
}

// roundTrip builds, checks what must hold for every index, restores, and
// returns the index and the masked diff. Its error is Build's.
func roundTrip(t testing.TB, diff []byte, o Options) (*blockdev.Index, []byte, error) {
	t.Helper()
	m := newMemory()
	ix, err := Build(t.Context(), bytes.NewReader(diff), m.put, o)
	if err != nil {
		return nil, nil, err
	}
	if ix.DiffID != blockdev.Sum(diff) || ix.DiffSize != int64(len(diff)) {
		t.Fatalf("index of %v, %d bytes; the diff is %v, %d", ix.DiffID, ix.DiffSize, blockdev.Sum(diff), len(diff))
	}
	masked, err := m.masked(ix)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range masked {
		if b != 0 && b != diff[i] {
			t.Fatalf("byte %d of the masked diff is %#x, of the diff %#x", i, b, diff[i])
		}
	}
	var got bytes.Buffer
	if err := Restore(t.Context(), ix, bytes.NewReader(masked), m.piece, &got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), diff) {
		t.Fatal("restored bytes differ")
	}
	return ix, masked, nil
}

// oneByte reads a diff a byte at a time.
func oneByte(diff []byte) io.Reader { return iotest.OneByteReader(bytes.NewReader(diff)) }
