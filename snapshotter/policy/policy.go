// Package policy says what a node's config wants of an image: whether it may be
// lazy, whether its pull waits for all bytes, and what of it is fetched when no
// container asks.
//
// Rules name images by patterns. A Policy is made of them once and never changes.
package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/shoalfs/shoal/internal/pattern"
)

// Mode says what is fetched of a lazy image besides what containers read.
type Mode string

// The modes.
const (
	All     Mode = "all"     // every byte
	Startup Mode = "startup" // what containers of the image are known to read at their start
	None    Mode = "none"    // nothing
)

func (m Mode) check() error {
	switch m {
	case All, Startup, None:
		return nil
	}
	return fmt.Errorf("is %q: it is %q, %q or %q", string(m), All, Startup, None)
}

// Rules are what New makes a Policy of. The lists hold patterns.
type Rules struct {
	// Lazy lists the images that may be lazy, unless Never lists them.
	Lazy, Never []string
	// Eager lists the images whose pull ends only when every byte is here.
	Eager []string
	// Prefetch has a mode for each pattern: the most specific one that fits an image
	// counts, and Default where there is none.
	Prefetch map[string]Mode
	Default  Mode
}

// Policy answers for one node. It is safe for concurrent use. A nil Policy lets
// every image be lazy, and has all of it fetched.
type Policy struct {
	lazy, never, eager []pattern.Pattern
	modes              []rule // the most specific one first
	fallback           Mode
}

type rule struct {
	pattern.Pattern
	mode Mode
}

// New makes a Policy of rules, or says everything that is wrong with them. Errors
// begin with the names that the lists have in a node's config.
func New(r Rules) (*Policy, error) {
	p := &Policy{fallback: r.Default}
	var errs []error
	if err := r.Default.check(); err != nil {
		errs = append(errs, fmt.Errorf("prefetch %w", err))
	}
	for _, l := range []struct {
		key   string
		texts []string
		to    *[]pattern.Pattern
	}{{"lazy", r.Lazy, &p.lazy}, {"never", r.Never, &p.never}, {"eager", r.Eager, &p.eager}} {
		for _, text := range l.texts {
			pt, err := pattern.Parse(text)
			if err != nil {
				errs = append(errs, fmt.Errorf("images.%s: %w", l.key, err))
			}
			*l.to = append(*l.to, pt)
		}
	}
	for text, mode := range r.Prefetch {
		pt, err := pattern.Parse(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("images.prefetch: %w", err))
		}
		if err := mode.check(); err != nil {
			errs = append(errs, fmt.Errorf("images.prefetch: the mode of %q %w", text, err))
		}
		p.modes = append(p.modes, rule{pt, mode})
	}
	slices.SortFunc(p.modes, func(a, b rule) int { return pattern.Compare(a.Pattern, b.Pattern) })
	for i := 1; i < len(p.modes); i++ {
		if a, b := p.modes[i-1], p.modes[i]; a.Same(b.Pattern) && a.String() != b.String() {
			errs = append(errs, fmt.Errorf("images.prefetch: %q and %q name the same images: leave one of them out", a, b))
		}
	}
	if len(errs) > 0 {
		slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
		return nil, errors.Join(errs...)
	}
	return p, nil
}

// Lazy says whether an image may be lazy at all.
func (p *Policy) Lazy(ref string) bool { return p.NotLazy(ref) == "" }

// NotLazy says which rule keeps an image from being lazy; empty: none does.
func (p *Policy) NotLazy(ref string) string {
	if p == nil {
		return ""
	}
	r := pattern.ParseRef(ref)
	if pt, ok := first(p.never, r); ok {
		return fmt.Sprintf("the config's images.never names it (%q)", pt)
	}
	if _, ok := first(p.lazy, r); !ok {
		return "the config's images.lazy does not name it"
	}
	return ""
}

// Eager says whether the pull of an image ends only when every byte of it is here
// and proven.
func (p *Policy) Eager(ref string) bool {
	if p == nil {
		return false
	}
	_, ok := first(p.eager, pattern.ParseRef(ref))
	return ok
}

// Prefetch says what is fetched of an image besides what containers read. Of an
// eager image it is everything.
func (p *Policy) Prefetch(ref string) Mode {
	if p == nil {
		return All
	}
	r := pattern.ParseRef(ref)
	if _, ok := first(p.eager, r); ok {
		return All
	}
	for _, rule := range p.modes {
		if rule.Matches(r) {
			return rule.mode
		}
	}
	return p.fallback
}

func first(list []pattern.Pattern, r pattern.Ref) (pattern.Pattern, bool) {
	for _, pt := range list {
		if pt.Matches(r) {
			return pt, true
		}
	}
	return pattern.Pattern{}, false
}
