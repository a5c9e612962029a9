package exchange_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/exchange/exchangetest"
)

// chunkStore is chunks in memory, as they are sent.
type chunkStore map[blockdev.Digest]exchange.Encoded

func (s chunkStore) Chunk(ctx context.Context, d blockdev.Digest) (exchange.Encoded, error) {
	if err := ctx.Err(); err != nil {
		return exchange.Encoded{}, err
	}
	if e, ok := s[d]; ok {
		return e, nil
	}
	return exchange.Encoded{}, fmt.Errorf("chunk %s: %w", d.Hex(), blockdev.ErrNotFound)
}

func TestStoreProvider(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = enc.Close() })
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprintf("compressed=%v", compress), func(t *testing.T) {
			exchangetest.TestProvider(t, func(_ *testing.T, ix *blockdev.Index, data []byte) (exchange.Provider, exchange.Query) {
				s := chunkStore{}
				for _, c := range ix.Chunks {
					b := data[c.Offset:][:c.Length]
					e := exchange.Encoded{Data: b, Length: c.Length}
					if compress {
						e.Data, e.Zstd = enc.EncodeAll(b, nil), true
					}
					s[c.Digest] = e
				}
				return exchange.StoreProvider(s), exchange.Query{Diff: ix.DiffID}
			})
		})
	}
}
