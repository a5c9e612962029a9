package blockdev

import "context"

// MaxProfile is how many chunks a startup profile has at most: about 512 MiB.
const MaxProfile = 8192

// Touch is one chunk of a startup profile.
type Touch struct {
	// Chunk is its number in the diff's chunk table.
	Chunk uint32
	// Rank orders it among the chunks of all diffs of an image: how many others
	// were touched for the first time before it.
	Rank uint32
}

// Profile is the startup profile of one diff: the chunks that containers read in
// their first seconds, each once, in the order in which they need them. It is a
// hint and not a part of the index: each user makes sure that the numbers are
// ones of the diff. Package profile encodes and merges it.
type Profile []Touch

// DiffProfile is a profile and the diff that it belongs to.
type DiffProfile struct {
	Diff    Digest
	Profile Profile
}

// ProfileSink collects the profiles that a node has learned: a supernode.
type ProfileSink interface {
	// ReportProfiles hands over what one start has touched. The profiles are a
	// hint: an error only means that later starts may be slower.
	ReportProfiles(ctx context.Context, profiles []DiffProfile) error
}
