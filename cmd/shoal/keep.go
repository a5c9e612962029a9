package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/keep"
	"github.com/shoalfs/shoal/internal/program"
)

func newKeepCommand() *cobra.Command {
	c := keep.Config{Launcher: []string{"keep", "--launch", "--"}}
	var launch bool
	cmd := &cobra.Command{
		Use:   "keep [flags] -- COMMAND [ARG]...",
		Short: "Run a node without systemd, so that containers survive its restarts",
		Long: `Keep starts COMMAND, which is shoal node with its flags, and starts it again when
it ends. While the node is away, keep holds its file descriptors: reads in
containers, and calls of containerd, wait until the node is back, and do not fail.
systemd does the same by itself, with the unit file that comes with shoal.

To upgrade, replace the program's file and send SIGUSR2 to keep: the new program
takes over. If it does not get ready, the old one is started again.

SIGTERM and SIGINT end the node and keep. SIGHUP, SIGQUIT and SIGUSR1 are passed on:
with SIGHUP the node reads its config again.`,
		Example: "  shoal keep -- /usr/local/bin/shoal node --config /etc/shoal/node.toml",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("no command is given: name it, as in shoal keep -- shoal node")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if launch {
				return keep.Launch(cmd.Context(), args)
			}
			if c.StartTimeout <= 0 || c.StopTimeout <= 0 {
				return errors.New("--start-timeout and --stop-timeout must be more than 0")
			}
			c.Command, c.Log = args, newLogger(config.Log{Format: "text"}).With("keep", os.Getpid())
			if err := program.Detach(); err != nil {
				return err
			}
			signals := make(chan os.Signal, 16)
			signal.Notify(signals, keep.Signals()...)
			defer signal.Stop(signals)
			if err := keep.Run(c, signals); err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return nil
		},
	}
	cmd.Flags().DurationVar(&c.StartTimeout, "start-timeout", time.Minute, "how long a new program may take to get ready before the old one is started again")
	cmd.Flags().DurationVar(&c.StopTimeout, "stop-timeout", 30*time.Second, "how long the node may take to end before it is killed")
	cmd.Flags().BoolVar(&launch, "launch", false, "")
	cmd.Flags().Lookup("launch").Hidden = true
	return cmd
}
