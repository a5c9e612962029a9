package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node"
	"github.com/shoalfs/shoal/internal/program"
)

func newNodeCommand() *cobra.Command {
	path := nodeConfigPath
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Run the daemon of a machine that runs containers",
		Long: `Node is containerd's snapshotter on this machine. It needs root, and in
containerd's config:

  [proxy_plugins.shoal]
    type = "snapshot"
    address = "/run/shoal/shoal.sock"
    capabilities = ["remap-ids"]
    [proxy_plugins.shoal.exports]
      root = "/var/lib/shoal"
      enable_remote_snapshot_annotations = "true"

It is also a registry mirror on loopback: manifests come through the supernode as
well, pulls of images that are new in the datacenter wait there, and private images
are lazy for pulls that have a credential. The file that ca names is made at the first
start. In /etc/containerd/certs.d/_default/hosts.toml:

  [host."https://127.0.0.1:7704"]
    ca = "/var/lib/shoal/mirror-ca.pem"
    capabilities = ["pull", "resolve"]`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			load := func() (*config.Node, error) {
				c := config.DefaultNode()
				return c, loadConfig(cmd, path, c)
			}
			c, err := load()
			if err != nil {
				return err
			}
			if err := program.Detach(); err != nil {
				return err
			}
			program.SetName(cmd.Root().Name())
			c, store, err := takeTurn(cmd.Context(), c, load)
			if err != nil {
				return err
			}
			log, level := newLeveledLogger(c.Log)
			d, err := node.Open(cmd.Context(), node.Config{Node: c, Load: load, Store: store, Log: log, Level: level, Version: version})
			if err != nil {
				return err
			}
			return errors.Join(d.Serve(cmd.Context()), d.Close())
		},
	}
	cmd.Flags().StringVar(&path, "config", path, "config file; the default one may be missing")
	return cmd
}

// takeTurn returns what the process before this one has left, when that one has ended, and
// the config as it is then: a change that came while this process waited was loaded, if
// at all, by the other one. If the file cannot be loaded any more, then what was loaded
// before counts, as at a reload.
func takeTurn(ctx context.Context, loaded *config.Node, load func() (*config.Node, error)) (*config.Node, *fdstore.Store, error) {
	store, err := fdstore.Open(ctx)
	if err != nil {
		return nil, nil, err
	}
	c, err := load()
	if err != nil {
		newLogger(loaded.Log).Error("config not reloaded; the old values stay in use", "error", err)
		return loaded, store, nil
	}
	return c, store, nil
}
