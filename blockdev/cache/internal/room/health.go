package room

import (
	"errors"
	"fmt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
)

// Failed is called with the error of a write for a diff. It makes ErrNoSpace of a full
// disk's error, and logs the first of a series.
func (r *Room) Failed(diff blockdev.Digest, err error) error {
	if disk.Full(err) {
		r.disk.Store(0) // somebody else has filled the disk
		err = fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	switch first := r.untilWorks.Swap(worksAfter) == 0; {
	case !first:
	case errors.Is(err, blockdev.ErrNoSpace):
		r.log.Warn("the cache is full; reads go on without it, and fetch their missing bytes again each time", "diff", diff, "error", err)
	default:
		r.log.Error("cannot write to the cache; reads go on without it, and fetch their missing bytes again each time", "diff", diff, "error", err)
	}
	return err
}

// worksAfter is how many bytes must be written without a failure before the disk
// is thought well again. Short chunks still fit on a disk that is full for others.
const worksAfter = 2 << 20

// Worked is called when n bytes were written.
func (r *Room) Worked(n int) {
	if r.untilWorks.Load() > 0 && r.untilWorks.Add(int64(-n)) <= 0 {
		r.untilWorks.Store(0)
		r.log.Info("the cache can be written to again", "root", r.root)
	}
}
