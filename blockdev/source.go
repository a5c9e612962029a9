package blockdev

import "context"

// Priority says whether a read waits for a request. Demand goes first,
// always.
type Priority uint8

const (
	// Prefetch is work that no read waits for.
	Prefetch Priority = iota
	// Demand is a read that somebody is blocked on.
	Demand
	// Startup is what a container that starts will read in a moment, by its
	// startup profile: after demand, before prefetch.
	Startup
)

// Request asks for chunks of one diff.
type Request struct {
	// Diff is the diff that the chunks belong to.
	Diff Digest
	// Priority orders requests where they compete.
	Priority Priority
	// Hops is how often the request was forwarded from node to node before it
	// came to this one; 0: it is this node's own.
	Hops int
	// Chunks are wanted, in this order of preference. Pieces of the header stream
	// are asked for as chunks, too; their Offset lies behind the diff. The callee
	// does not keep the slice.
	Chunks []Chunk
	// From, if not nil, is where the chunk comes from that is delivered next: a Source
	// that knows sets it before each call of Deliver.
	From *Origin
}

// Comes notes where the chunk comes from that is delivered next.
func (r *Request) Comes(from Origin) {
	if r.From != nil {
		*r.From = from
	}
}

// Deliver takes the bytes of Chunks[i] of a request. data is valid until it
// returns. Nil means that they have the digest: the source may pass them on.
// An error that wraps ErrCorrupt means that data does not have the
// digest, so the sender is to be distrusted; the source may deliver the
// same i again from elsewhere. Any other error ends the request.
type Deliver func(i int, data []byte) error

// Source is where chunks come from: a supernode, a group of peers, or several
// of these behind each other.
type Source interface {
	// Fetch delivers each chunk once (a second time only after Deliver found
	// ErrCorrupt), in any order, one call of deliver at a time. It returns nil
	// when all were delivered; otherwise what was delivered stays delivered and
	// the error says why the rest was not: ErrNotFound, ErrUnavailable,
	// ErrCorrupt, the context's error, or deliver's.
	Fetch(ctx context.Context, req Request, deliver Deliver) error
}
