// Package outcome is how requests and work end, as metrics say it.
package outcome

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry"
)

// Counter is a counter by outcome.
func Counter(name, help string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"outcome"})
}

// Of is the label for an error: one of ten.
func Of(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "canceled"
	case registry.NotAllowed(err):
		return "not_allowed"
	case errors.Is(err, blockdev.ErrUnauthorized):
		return "unauthorized"
	case errors.Is(err, blockdev.ErrUnavailable):
		return "unavailable"
	case errors.Is(err, blockdev.ErrNoSpace):
		return "no_space"
	case errors.Is(err, blockdev.ErrCorrupt):
		return "corrupt"
	case errors.Is(err, blockdev.ErrUnsupported):
		return "unsupported"
	case errors.Is(err, blockdev.ErrNotFound):
		return "not_found"
	}
	return "error"
}
