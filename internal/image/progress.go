package image

import "github.com/shoalfs/shoal/blockdev"

// Stage is what is being done with a layer, in a word for people.
type Stage string

// The stages. Layers that are not stored go through the first four, those that
// are stored already and came from another registry are verified.
const (
	// StageWaiting: for others to be done, or for room.
	StageWaiting Stage = "waiting"
	// StageFetching: it comes from the registry, and is hashed, unpacked and
	// stored as it comes.
	StageFetching Stage = "fetching"
	// StageUnpacking: all of it is there, the rest is being unpacked.
	StageUnpacking Stage = "unpacking"
	// StageStoring: its index is written.
	StageStoring Stage = "storing"
	// StageVerifying: it is fetched again, only to see that this registry has
	// it, too.
	StageVerifying Stage = "verifying"
	// StageStored: done.
	StageStored Stage = "stored"
)

// Progress says where a layer is on its way to the supernode that was asked for it.
type Progress struct {
	Layer blockdev.Digest
	// Done and Total are compressed bytes.
	Done, Total int64
	Stage       Stage
}
