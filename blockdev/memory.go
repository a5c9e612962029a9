package blockdev

import "context"

// Memory is where a read puts its bytes. A read may wait long for bytes, so it asks for
// memory only when they are at hand: the memory for all answers can be bounded then, and
// a read whose bytes never come keeps none of it from others.
type Memory interface {
	// Take returns n bytes. from is the farthest place that some of the read's bytes
	// have come from. Take may wait for memory that others have and soon give back; its
	// error is ctx's cause.
	Take(ctx context.Context, n int, from Origin) ([]byte, error)
	// Give takes back what Take returned, since the read has to wait for bytes once
	// more. It is not called at the end of a read.
	Give()
}
