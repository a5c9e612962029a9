package roster

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

// A grant says that a supernode has given a peer the indexes of an image, on the
// word of a registry for one of its repositories: version (1), the supernode's key
// (32), the SHA-256 of "host/repository" (32), and the supernode's signature (64) of
//
//	"shoal grant 2\n" | the peer's key (32) | the manifest's digest (32) | SHA-256 of "host/repository" (32)
//
// So it is worth nothing to another peer, and a supernode needs to remember
// nothing: it counts after a restart, and for siblings that know the key.
const (
	grantVersion = 2
	grantOrigin  = 1 + wire.KeyLen
	grantSig     = grantOrigin + sha256.Size
	grantLen     = grantSig + ed25519.SignatureSize
	grantText    = "shoal grant 2\n"
)

// granter makes and checks grants.
type granter struct {
	key     crypto.PrivKey
	self    wire.Key
	trusted atomic.Pointer[map[wire.Key]bool] // whose grants count; replaced, and never changed
}

func newGranter(key crypto.PrivKey) (*granter, error) {
	id, err := host.ID(key)
	if err != nil {
		return nil, err
	}
	self, ok := host.Key(id)
	if !ok {
		return nil, fmt.Errorf("%s is not the ID of an Ed25519 key", id)
	}
	g := &granter{key: key, self: self}
	return g, g.trust(nil)
}

// trust sets whose grants count beside its own.
func (g *granter) trust(siblings []peer.ID) error {
	trusted := map[wire.Key]bool{g.self: true}
	for _, id := range siblings {
		k, ok := host.Key(id)
		if !ok {
			return fmt.Errorf("%s is not the ID of an Ed25519 key", id)
		}
		trusted[k] = true
	}
	g.trusted.Store(&trusted)
	return nil
}

func grantMessage(holder wire.Key, manifest, origin blockdev.Digest) []byte {
	return slices.Concat([]byte(grantText), holder[:], manifest[:], origin[:])
}

// originOf is how a grant names whose word it was given on, "host/repository".
func originOf(origin string) blockdev.Digest { return blockdev.Sum([]byte(origin)) }

func (g *granter) make(holder wire.Key, manifest, origin blockdev.Digest) ([]byte, error) {
	sig, err := g.key.Sign(grantMessage(holder, manifest, origin))
	if err != nil {
		return nil, fmt.Errorf("sign a grant: %w", err)
	}
	return slices.Concat([]byte{grantVersion}, g.self[:], origin[:], sig), nil
}

// check returns the grant's origin if it is for this holder and manifest.
func (g *granter) check(grant []byte, holder wire.Key, manifest blockdev.Digest) (origin blockdev.Digest, err error) {
	if len(grant) != grantLen || grant[0] != grantVersion {
		return origin, fmt.Errorf("grant of %d bytes, not %d, or of another version: %w", len(grant), grantLen, blockdev.ErrUnauthorized)
	}
	signer := wire.Key(grant[1:])
	if !(*g.trusted.Load())[signer] {
		return origin, fmt.Errorf("grant of %s, which is neither this supernode nor one of its siblings: %w", host.FromKey(signer), blockdev.ErrUnauthorized)
	}
	origin = blockdev.Digest(grant[grantOrigin:])
	if !ed25519.Verify(signer[:], grantMessage(holder, manifest, origin), grant[grantSig:]) {
		return origin, fmt.Errorf("grant for another node or image: %w", blockdev.ErrUnauthorized)
	}
	return origin, nil
}
