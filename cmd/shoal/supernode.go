package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/super"
)

func newSupernodeCommand() *cobra.Command {
	path := supernodeConfigPath
	cmd := &cobra.Command{
		Use:   "supernode",
		Short: "Run the datacenter's cache, the only one that talks to registries",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			load := func() (*config.Supernode, error) {
				c := config.DefaultSupernode()
				return c, loadConfig(cmd, path, c)
			}
			c, err := load()
			if err != nil {
				return err
			}
			log, level := newLeveledLogger(c.Log)
			d, err := super.Open(cmd.Context(), super.Config{Supernode: c, Load: load, Log: log, Level: level, Version: version})
			if err != nil {
				return err
			}
			return errors.Join(d.Serve(cmd.Context()), d.Close())
		},
	}
	cmd.Flags().StringVar(&path, "config", path, "config file; the default one may be missing")
	return cmd
}
