// Command shoal is the one program of shoal: the node daemon, the supernode
// daemon, and what operators use beside them. Each subcommand has its own file;
// this one only puts them together.
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

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
)

// version is set by the linker (Makefile).
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newCommand().ExecuteContext(ctx)
	stop()
	var status *exitError
	switch {
	case errors.As(err, &status):
		os.Exit(status.code) // what there is to say has been said
	case err != nil:
		fmt.Fprintln(os.Stderr, "shoal:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "shoal",
		Short: "Start containers before their image is there",
		Long: `shoal is a containerd snapshotter that starts containers before their image is
there, and brings the image from nearby.

A supernode per datacenter fetches each layer from the registry once. A node
mounts an image when it has its index; what containers read comes on demand, and
the rest follows in the background.`,
		Version:       versionLine(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.SetVersionTemplate("{{.Version}}")
	cmd.AddCommand(newNodeCommand(), newSupernodeCommand(), newConfigCommand(), newInstallCommand(),
		newKeepCommand(), newPrefetchCommand(), newStatusCommand(), newCheckCommand(), newMembersCommand(), newReloadCommand(), newStoreCommand(), newVersionCommand(), newManCommand())
	return cmd
}

// newLogger makes the logger that everything in a daemon writes to.
func newLogger(c config.Log) *slog.Logger {
	log, _ := newLeveledLogger(c)
	return log
}

// newLeveledLogger is newLogger with a level that may change.
func newLeveledLogger(c config.Log) (*slog.Logger, *slog.LevelVar) {
	level := new(slog.LevelVar)
	level.Set(c.Level)
	return loggerAt(c, level), level
}

func loggerAt(c config.Log, level slog.Leveler) *slog.Logger {
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, o))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, o))
}
