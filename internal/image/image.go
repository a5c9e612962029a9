package image

import (
	"context"
	"net/netip"

	"github.com/shoalfs/shoal/blockdev"
)

// Platform is the os/architecture/variant that is chosen from a
// multi-platform image, in the words of the OCI image index.
type Platform struct {
	OS           string
	Architecture string
	Variant      string
}

// Credential is what a node shows to be let at a registry. The zero value is
// anonymous access. It is passed on to that registry alone and never stored.
type Credential struct {
	// Username is empty if Secret is an identity (refresh) token.
	Username string
	Secret   string
}

// Request asks for all indexes of an image.
type Request struct {
	// Ref is the image reference as the user wrote it, with its registry host:
	// "docker.io/library/redis:7".
	Ref string
	// Manifest is the digest of the platform's manifest (or of an image index);
	// zero: what Ref's tag or digest names now.
	Manifest blockdev.Digest
	// Platform is chosen where Manifest or Ref is an image index.
	Platform Platform
	// Credential is the node's for Ref's registry.
	Credential Credential
	// Have lists layer digests of which the node has the index already; their
	// Index comes back nil.
	Have []blockdev.Digest
	// Only and Stored are for supernodes among themselves: which layers (by
	// digest) are wanted, if not all; and that nothing is to be fetched for it.
	Only   []blockdev.Digest
	Stored bool
	// Relay: the image is to stay here, so that its indexes may come from other nodes
	// that have it. To a peer an answer may then name these (Image.Relays).
	Relay bool
	// Admit, if not nil, is called with the bytes of indexes that the image has before they
	// are taken into memory. It must not wait, and may be called more than once. FetchIndexes
	// ends with its error, which it wraps.
	Admit func(bytes int64) error
	// Progress, if not nil, is called with how far the layers are while the answer is
	// waited for. Calls come one at a time and must not block; none comes after
	// FetchIndexes has returned.
	Progress func(Progress)
	// Alive, if not nil, is called when the source gives a sign that it is at work. It
	// must not block.
	Alive func()
}

// Layer is one layer of an image.
type Layer struct {
	// Digest and Size (bytes) are those of the compressed blob.
	Digest blockdev.Digest
	Size   int64
	// DiffID is what the image config says, and the one inside Index.
	DiffID blockdev.Digest
	// Index is the encoded index (package index reads it); nil where the
	// request's Have named Digest, and where Image.Relays have it.
	Index []byte
	// IndexSize is the length, in bytes, of an index that Relays have, else 0, and
	// IndexDigest its SHA-256.
	IndexSize   int64
	IndexDigest blockdev.Digest
	// Profile is what containers have read of it in their first seconds, if that
	// is known; also where Index is nil. It is a hint and not checked.
	Profile blockdev.Profile
}

// Image is what a Request gives, layers from the bottom up.
type Image struct {
	// Ref is the request's.
	Ref string
	// Manifest is the digest of the manifest that was used.
	Manifest blockdev.Digest
	Layers   []Layer
	// Grant shows supernodes that this node was given the indexes, so that it may
	// join the image's group; nil: there are no groups here. It counts for this
	// node alone.
	Grant []byte
	// Relays are nodes that have been given the indexes before, to be asked in this
	// order for those that are not here.
	Relays []Relay
}

// Relay is a node that passes on an image's indexes.
type Relay struct {
	// Key is the Ed25519 public key that is its identity.
	Key [32]byte
	// Addrs are where it listens.
	Addrs []netip.AddrPort
}

// Source is where indexes come from: a supernode.
type Source interface {
	// FetchIndexes returns the indexes of all layers, or none of them. Its errors
	// wrap blockdev.ErrNotFound, ErrUnauthorized, ErrUnsupported, ErrUnavailable,
	// ErrCorrupt, ErrNoSpace or the context's error, and name the image and the
	// cause.
	FetchIndexes(ctx context.Context, req Request) (*Image, error)
}
