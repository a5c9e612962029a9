package images

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// Cause is a class of reasons why an image is not lazy; there is a small number.
type Cause string

// The causes.
const (
	CauseConfig       Cause = "config"       // the node's config does not want it
	CauseUnlabelled   Cause = "unlabelled"   // containerd has not said which image it is
	CauseSlow         Cause = "slow"         // its indexes did not come in time
	CauseUnavailable  Cause = "unavailable"  // no machine that has it answers
	CauseUnauthorized Cause = "unauthorized" // the pull's credential does not open it
	CauseNotFound     Cause = "not_found"    // its registry does not have it
	CauseUnsupported  Cause = "unsupported"  // nothing that can be mounted here
	CauseCorrupt      Cause = "corrupt"      // what came is not what was asked for
	CauseNoSpace      Cause = "no_space"     // no room on this disk
	CauseOrder        Cause = "order"        // containerd asks for its layers in another order
	CauseOther        Cause = "other"
)

// Causes are all of them.
var Causes = []Cause{
	CauseConfig, CauseUnlabelled, CauseSlow, CauseUnavailable, CauseUnauthorized, CauseNotFound,
	CauseUnsupported, CauseCorrupt, CauseNoSpace, CauseOrder, CauseOther,
}

// CauseOf finds the class of an error of opening an image.
func CauseOf(err error) Cause {
	switch {
	case errors.Is(err, ErrSlow), errors.Is(err, context.DeadlineExceeded):
		return CauseSlow
	case errors.As(err, new(refused)):
		return CauseConfig
	}
	return cmp.Or(Cause(blockdev.Kind(err)), CauseOther)
}

// Refusal says of an image why it was not lazy when it was pulled last.
type Refusal struct {
	Ref   string    `json:"ref"` // empty: containerd has not said which image it is
	Cause Cause     `json:"cause"`
	Why   string    `json:"why"`
	At    time.Time `json:"at"`
}

const (
	// maxRefusals are remembered, the newest ones.
	maxRefusals = 100
	// maxWhy bounds what is remembered of one, in bytes: registries write some of it.
	maxWhy = 1 << 10
)

// refusals remembers them, each image once.
type refusals struct {
	log   *slog.Logger
	added func(Refusal)
	mu    sync.Mutex
	list  []Refusal // the newest last
	count map[Cause]int64
	// unlabelled is the last ChainID that was asked for without an image's name.
	unlabelled string
}

// lowest notes a layer without its image's name, and reports whether it is not on top of
// the last one of these.
func (r *refusals) lowest(chain, below string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	above := below != "" && r.unlabelled == below
	r.unlabelled = chain
	return !above
}

// warn adds one, and writes the line that says why an image is not lazy.
func (r *refusals) warn(ref string, cause Cause, why string, attr ...any) {
	r.add(ref, cause, why)
	r.log.Warn("image is not lazy; containerd unpacks it", append([]any{"image", ref, "error", why}, attr...)...)
}

func (r *refusals) add(ref string, cause Cause, why string) {
	if len(why) > maxWhy {
		why = strings.ToValidUTF8(why[:maxWhy], "") + " ..."
	}
	o := Refusal{Ref: ref, Cause: cause, Why: why, At: time.Now().UTC()}
	r.put(o)
	r.added(o)
}

func (r *refusals) put(o Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.count == nil {
		r.count = make(map[Cause]int64)
	}
	r.count[o.Cause]++
	r.forgetLocked(o.Ref)
	r.list = append(r.list, o)
	if n := len(r.list) - maxRefusals; n > 0 {
		r.list = slices.Delete(r.list, 0, n)
	}
}

func (r *refusals) forget(ref string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forgetLocked(ref)
}

func (r *refusals) forgetLocked(ref string) {
	r.list = slices.DeleteFunc(r.list, func(o Refusal) bool { return o.Ref == ref })
}

func (r *refusals) all() []Refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

func (r *refusals) counted(c Cause) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.count[c]
}
