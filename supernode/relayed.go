package supernode

import (
	"context"

	"github.com/shoalfs/shoal/blockdev"
)

// relayFrom is from how many bytes of indexes a node is sent to other nodes for
// them: less is sent sooner than a connection is made.
const relayFrom = 32 << 10

// relayed takes the indexes out of an answer if there are nodes that have them, and
// names these. A thousand nodes that begin at once would have the indexes alone fill
// the supernode's link for some images' worth of time.
func (s *Supernode) relayed(ctx context.Context, peer string, img *blockdev.Image) {
	size := 0
	for i := range img.Layers {
		size += len(img.Layers[i].Index)
	}
	if s.relays == nil || size < relayFrom {
		return
	}
	relays := s.relays(ctx, peer, img.Manifest)
	if len(relays) == 0 {
		return
	}
	s.metrics.relayed.Inc()
	img.Relays = relays
	for i := range img.Layers {
		l := &img.Layers[i]
		l.IndexSize, l.Index = int64(len(l.Index)), nil
	}
}
