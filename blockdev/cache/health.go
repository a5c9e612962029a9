package cache

import (
	"errors"
	"fmt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
)

// failed is called with the error of a write for a diff. It makes ErrNoSpace of a full
// disk's error, and logs the first of a series.
func (s *space) failed(diff blockdev.Digest, err error) error {
	if disk.Full(err) {
		s.disk.Store(0) // somebody else has filled the disk
		err = fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
	}
	switch first := s.untilWorks.Swap(worksAfter) == 0; {
	case !first:
	case errors.Is(err, blockdev.ErrNoSpace):
		s.log.Warn("the cache is full; reads go on without it, and fetch their missing bytes again each time", "diff", diff, "cause", err)
	default:
		s.log.Error("cannot write to the cache; reads go on without it, and fetch their missing bytes again each time", "diff", diff, "cause", err)
	}
	return err
}

// worksAfter is how many bytes must be written without a failure before the disk
// is thought well again. Short chunks still fit on a disk that is full for others.
const worksAfter = 2 << 20

// worked is called when n bytes were written.
func (s *space) worked(n int) {
	if s.untilWorks.Load() > 0 && s.untilWorks.Add(int64(-n)) <= 0 {
		s.untilWorks.Store(0)
		s.log.Info("the cache can be written to again", "root", s.root)
	}
}
