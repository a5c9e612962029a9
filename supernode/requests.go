package supernode

import (
	"context"
	"fmt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/tasks"
)

var errStopping = fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)

// requests are those that run. They end with the supernode.
type requests struct{ *tasks.Group }

// do runs a request; its context also ends with the supernode. The error is that of run
// or says, of what, that the supernode is stopping.
func (r requests) do(ctx context.Context, what string, run func(context.Context) error) error {
	end, ok := r.Begin()
	if !ok {
		return fmt.Errorf("%.300s: %w", what, errStopping)
	}
	defer end()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.Context(), cancel)()
	err := run(ctx)
	if err != nil && r.Context().Err() != nil {
		return fmt.Errorf("%.300s: %w", what, errStopping)
	}
	return err
}
