package images

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/shoalfs/shoal/blockdev"
)

// TestRefusalsAreBounded: the newest are remembered, and not more of one than its bound.
func TestRefusalsAreBounded(t *testing.T) {
	r := refusals{added: func(Refusal) {}}
	for i := range 3 * maxRefusals {
		r.add(fmt.Sprint(i), CauseOther, strings.Repeat("ä", maxWhy))
	}
	if len(r.list) != maxRefusals || r.list[0].Ref != fmt.Sprint(2*maxRefusals) || len(r.list[0].Why) > maxWhy+4 || !utf8.ValidString(r.list[0].Why) {
		t.Errorf("%d are remembered, from %s on, of %d bytes", len(r.list), r.list[0].Ref, len(r.list[0].Why))
	}
}

// TestCauses: errors of opening an image have their class, whatever wraps them.
func TestCauses(t *testing.T) {
	for err, want := range map[error]Cause{
		blockdev.ErrUnavailable: CauseUnavailable, blockdev.ErrUnauthorized: CauseUnauthorized, blockdev.ErrNotFound: CauseNotFound,
		blockdev.ErrCorrupt: CauseCorrupt, blockdev.ErrQuarantined: CauseCorrupt, blockdev.ErrNoSpace: CauseNoSpace,
		blockdev.ErrUnsupported: CauseUnsupported, context.DeadlineExceeded: CauseSlow, ErrSlow: CauseSlow, refused("x"): CauseConfig, ErrClosed: CauseOther,
	} {
		if got := CauseOf(fmt.Errorf("image x: %w", err)); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
}
