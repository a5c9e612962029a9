package members

import (
	"crypto/ed25519"
	"fmt"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

// A grant says that a supernode has given a peer the indexes of an image: version
// (1), the supernode's key (32), and its signature (64) of
//
//	"shoal grant 1\n" | the peer's key (32) | the manifest's digest (32)
//
// So it is worth nothing to another peer, and a supernode needs to remember
// nothing: it counts after a restart, and for siblings that know the key.
const (
	grantVersion = 1
	grantLen     = 1 + wire.KeyLen + ed25519.SignatureSize
	grantText    = "shoal grant 1\n"
)

// granter makes and checks grants.
type granter struct {
	key     crypto.PrivKey
	self    wire.Key
	trusted map[wire.Key]bool // whose grants count
}

func newGranter(key crypto.PrivKey, siblings []peer.ID) (*granter, error) {
	id, err := host.ID(key)
	if err != nil {
		return nil, err
	}
	g := &granter{key: key, trusted: map[wire.Key]bool{}}
	for _, id := range append([]peer.ID{id}, siblings...) {
		k, ok := host.Key(id)
		if !ok {
			return nil, fmt.Errorf("%s is not the ID of an Ed25519 key", id)
		}
		g.trusted[k] = true
	}
	g.self, _ = host.Key(id)
	return g, nil
}

func grantMessage(holder wire.Key, manifest blockdev.Digest) []byte {
	return append(append([]byte(grantText), holder[:]...), manifest[:]...)
}

func (g *granter) make(holder wire.Key, manifest blockdev.Digest) ([]byte, error) {
	sig, err := g.key.Sign(grantMessage(holder, manifest))
	if err != nil {
		return nil, fmt.Errorf("sign a grant: %w", err)
	}
	return append(append([]byte{grantVersion}, g.self[:]...), sig...), nil
}

// check returns nil if the grant is for this holder and manifest.
func (g *granter) check(grant []byte, holder wire.Key, manifest blockdev.Digest) error {
	if len(grant) != grantLen || grant[0] != grantVersion {
		return fmt.Errorf("grant of %d bytes, not %d, or of another version: %w", len(grant), grantLen, blockdev.ErrUnauthorized)
	}
	signer := wire.Key(grant[1:])
	if !g.trusted[signer] {
		return fmt.Errorf("grant of %s, which is neither this supernode nor named in its siblings: %w", host.FromKey(signer), blockdev.ErrUnauthorized)
	}
	if !ed25519.Verify(signer[:], grantMessage(holder, manifest), grant[1+wire.KeyLen:]) {
		return fmt.Errorf("grant for another node or image: %w", blockdev.ErrUnauthorized)
	}
	return nil
}
