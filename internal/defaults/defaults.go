// Package defaults fills in what a Config leaves out, one way for all packages: with calls
// of these functions, in a method setDefaults where there are many of them.
package defaults

import (
	"cmp"
	"log/slog"
)

// Set gives *v the value def if *v is the zero value.
func Set[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Positive gives *v the value def if *v is zero or negative.
func Positive[T cmp.Ordered](v *T, def T) {
	var zero T
	if *v <= zero {
		*v = def
	}
}

// Log gives *log a logger that drops everything if there is none.
func Log(log **slog.Logger) { Set(log, slog.New(slog.DiscardHandler)) }
