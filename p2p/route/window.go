package route

import (
	"github.com/shoalfs/shoal/blockdev"
)

// First says with which of a diff's n chunks a node begins to prefetch, going on
// from there and round: each node elsewhere, so that at any time the nodes of a
// group have different parts to give to each other.
func First(self string, diff blockdev.Digest, n int) int {
	if n <= 0 {
		return 0
	}
	return int(mix(hashID(self)^uint64(KeyOf(diff))) % uint64(n))
}
