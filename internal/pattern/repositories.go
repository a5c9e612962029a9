package pattern

import (
	"errors"
	"fmt"
)

// Repositories is a list of patterns for whole repositories. It never changes. A nil
// list has every repository.
type Repositories struct{ list []Pattern }

// ParseRepositories reads a list, or says all that is wrong with it. Tags and digests
// are refused: what is fetched by digest would not be found by them.
func ParseRepositories(texts []string) (*Repositories, error) {
	r := &Repositories{}
	var errs []error
	for _, text := range texts {
		p, err := Parse(text)
		if err == nil && !p.Whole() {
			err = fmt.Errorf("%q names a tag or a digest: name whole repositories, such as %q", text, p.name)
		}
		errs = append(errs, err)
		r.list = append(r.list, p)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return r, nil
}

// Has says whether a pattern fits a repository: its host and path, as in
// "docker.io/library/redis".
func (r *Repositories) Has(name string) bool {
	if r == nil {
		return true
	}
	for _, p := range r.list {
		if p.Fits(name) {
			return true
		}
	}
	return false
}
