package blockdev

// Use is how much of something limited is in use, waited for and there in all.
// Capacity 0 means no limit.
type Use struct{ Used, Waiting, Capacity int64 }
