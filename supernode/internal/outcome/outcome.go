// Package outcome is how requests and work end, as metrics say it.
package outcome

import (
	"cmp"
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/metric"
	"github.com/shoalfs/shoal/internal/registry"
)

// Counter is a counter by outcome.
func Counter(name, help string) *prometheus.CounterVec {
	return metric.CounterVec(name, help, "outcome")
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
	}
	return cmp.Or(blockdev.Kind(err), "error")
}
