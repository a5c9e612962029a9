package exchange

import (
	"context"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
)

// Query is a request for chunks as a Provider sees it. It must not be changed.
type Query struct {
	// From is the asking peer; its ID has been proven.
	From     peer.ID
	Priority blockdev.Priority
	Diff     blockdev.Digest
	// Group is the manifest digest of the image in whose group the request
	// travels; zero: none.
	Group blockdev.Digest
	// Hops is how often it was forwarded before it came here, 0 to 255.
	Hops    int
	Digests []blockdev.Digest
}

// Provider is where the chunks of a server come from that looks at requests as a
// whole: a node, which gets what it lacks from others.
type Provider interface {
	// Provide begins to get what q asks for and returns without waiting for it.
	// An error is the answer to the whole request: wire.ErrBusy, for example.
	Provide(ctx context.Context, q *Query) (Answer, error)
}

// Answer is what a Provider gives. Its chunks are sent as they become ready, in
// any order: nodes that waited for one chunk before they send the next could wait
// for each other in a circle.
type Answer interface {
	// Chunk returns the i-th chunk of the query, waiting for it if need be. It
	// is called for several chunks at the same time.
	Chunk(ctx context.Context, i int) (Encoded, error)
	// Wait returns when Chunk(i) need not wait any more, for the chunk or for its
	// error.
	Wait(ctx context.Context, i int)
	// Close is called when no call of Chunk is left and there will be none.
	Close()
}

// storeProvider is Chunks as a Provider.
type storeProvider struct{ Chunks }

func (p storeProvider) Provide(_ context.Context, q *Query) (Answer, error) {
	return &storeAnswer{p.Chunks, q.Digests}, nil
}

type storeAnswer struct {
	store   Chunks
	digests []blockdev.Digest
}

func (a *storeAnswer) Chunk(ctx context.Context, i int) (Encoded, error) {
	return a.store.Chunk(ctx, a.digests[i])
}

func (a *storeAnswer) Wait(context.Context, int) {}

func (a *storeAnswer) Close() {}
