package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
)

// Where the daemons look for their files.
const (
	nodeConfigPath      = "/etc/shoal/node.toml"
	supernodeConfigPath = "/etc/shoal/supernode.toml"
)

func newConfigCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Write the default config files, or check yours",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(&cobra.Command{
		Use:       "default {node|supernode}",
		Short:     "Print a config file with every key and its default",
		Example:   "  shoal config default node > " + nodeConfigPath,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"node", "supernode"},
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := config.Write(defaultConfig(args[0]))
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(b)
			return err
		},
	}, &cobra.Command{
		Use:     "check {node|supernode} FILE",
		Short:   "Check a config file, and name what is wrong in it",
		Example: "  shoal config check node " + nodeConfigPath,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 || (args[0] != "node" && args[0] != "supernode") {
				return fmt.Errorf("usage: shoal config check {node|supernode} FILE")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := config.Load(args[1], defaultConfig(args[0])); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: ok\n", args[1])
			return nil
		},
	})
	return cmd
}

func defaultConfig(role string) interface{ Check() error } {
	if role == "supernode" {
		return config.DefaultSupernode()
	}
	return config.DefaultNode()
}

// loadConfig reads path over the defaults in c. The default file may be missing,
// since every key has a default; one that was named must be there.
func loadConfig(cmd *cobra.Command, path string, c interface{ Check() error }) error {
	return loadNamed(path, cmd.Flags().Changed("config"), c)
}

// loadNamed is loadConfig for a path that was named, or is the default one.
func loadNamed(path string, named bool, c interface{ Check() error }) error {
	if !named && !exists(path) {
		return c.Check()
	}
	return config.Load(path, c)
}
