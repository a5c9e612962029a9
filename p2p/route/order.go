package route

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
)

// Order sorts supernodes (peer IDs, as bytes) by which of them a layer or a group belongs to,
// and returns them; ids stays as it is. This is rendezvous hashing: when one is gone,
// only what belonged to it moves on, and each piece to the same next one on all
// machines.
func Order[ID ~string](key blockdev.Digest, ids []ID) []ID {
	rank := make(map[ID]uint64, len(ids))
	for _, id := range ids {
		d := blockdev.Sum(append(key[:len(key):len(key)], id...))
		rank[id] = binary.BigEndian.Uint64(d[:8])
	}
	out := slices.Clone(ids)
	slices.SortFunc(out, func(a, b ID) int {
		return cmp.Or(cmp.Compare(rank[b], rank[a]), cmp.Compare(a, b))
	})
	return out
}
