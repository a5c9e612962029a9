package wire

import (
	"errors"
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/profile"
)

// MaxImageProfile is how many bytes of encoded profiles an ImageHeader may have
// in all; MaxProfileReport and MaxProfileAnswer bound the messages of these
// names, in bytes.
const (
	MaxImageProfile  = 768 << 10
	MaxProfileReport = profile.MaxEncoded + digestLen + slack
	MaxProfileAnswer = MaxErrorText + slack
)

// NewProfileReport puts what was read of one diff into a message.
func NewProfileReport(p *blockdev.DiffProfile) *ProfileReport {
	return &ProfileReport{Diff: p.Diff[:], Profile: profile.Append(nil, p.Profile)}
}

// ParseProfileReport reads and checks a ProfileReport, as far as a reader can
// without the diff. Errors wrap blockdev.ErrCorrupt.
func ParseProfileReport(b []byte) (*blockdev.DiffProfile, error) {
	m := &ProfileReport{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, corrupt("profile report", err)
	}
	if len(m.Diff) != digestLen {
		return nil, corrupt("profile report", fmt.Errorf("DiffID of %d bytes, not %d", len(m.Diff), digestLen))
	}
	p, err := profile.Decode(m.Profile, math.MaxUint32)
	if err == nil && len(p) == 0 {
		err = errors.New("it has no chunk")
	}
	if err != nil {
		return nil, corrupt("profile report", err)
	}
	return &blockdev.DiffProfile{Diff: blockdev.Digest(m.Diff), Profile: p}, nil
}

// ParseProfileAnswer reads a ProfileAnswer and returns the error in it; one that
// cannot be read wraps blockdev.ErrCorrupt.
func ParseProfileAnswer(b []byte) error {
	m := &ProfileAnswer{}
	if err := proto.Unmarshal(b, m); err != nil {
		return corrupt("profile answer", err)
	}
	if m.Error != nil {
		return m.Error.Err()
	}
	return nil
}
