package tasks

import (
	"errors"
	"slices"
)

// Closers end what an owner is made of, in the reverse of the order in which it was made.
type Closers []func() error

// Add is called when a part has been made.
func (c *Closers) Add(end func() error) { *c = append(*c, end) }

// Close ends all parts. A second call does nothing.
func (c *Closers) Close() error {
	var errs []error
	for _, end := range slices.Backward(*c) {
		errs = append(errs, end())
	}
	*c = nil
	return errors.Join(errs...)
}
