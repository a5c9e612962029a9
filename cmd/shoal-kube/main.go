// Command shoal-kube is what shoal has beside Kubernetes: it runs in pods of the chart,
// and knows the API server. The node's own program (shoal) does not. Each subcommand has
// its own file; this one only puts them together.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/shoalfs/shoal/internal/program"
)

// version is set by the linker (Makefile).
var version = "unknown"

func main() {
	// The node may serve the image that this program is in. The program replaces the node, and
	// tells that the node is away, so it must not wait for the node.
	if err := program.Detach(); err != nil {
		newLogger().Warn("cannot run from memory: while the node is away, this program may wait for the node", "error", err)
	}
	program.SetName("shoal-kube")
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newCommand().ExecuteContext(ctx)
	stop()
	status := &exitError{code: 1}
	switch {
	case err == nil:
		return
	case !errors.As(err, &status) || !status.said:
		fmt.Fprintln(os.Stderr, "shoal-kube:", err)
	}
	os.Exit(status.code)
}

// exitError ends the program with a status of its own.
type exitError struct {
	error

	code int
	// said is true if another process has printed the error.
	said bool
}

func (e *exitError) Unwrap() error { return e.error }

func newCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "shoal-kube",
		Short: "Install shoal on the nodes of a Kubernetes cluster, and show what it does there",
		Long: `shoal-kube is the part of shoal that knows Kubernetes. The chart runs it; its
commands work by hand, too.`,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.AddCommand(
		newWatchCommand(), newInstallCommand(), newPrepareCommand(), newUninstallCommand(), newForgetCommand(),
	)
	return cmd
}

// newLogger makes the logger that everything writes to, client-go as well.
func newLogger() *slog.Logger {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	klog.SetSlogLogger(log)
	return log
}
