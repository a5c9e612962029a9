package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/internal/control"
)

func newStoreCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "store",
		Short: "On a supernode: list what is stored, remove it, or keep it",
	}
	client := supernodeClient(cmd)
	list := &cobra.Command{
		Use:   "list",
		Short: "List the stored layers, the largest first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			layers, err := client().Stored(cmd.Context())
			if err != nil {
				return err
			}
			return show(cmd.OutOrStdout(), output, layers, writeStored)
		},
	}
	addOutputFlag(list, &output)
	cmd.AddCommand(list, &cobra.Command{
		Use:   "remove IMAGE|DIGEST",
		Short: "Remove an image's layers that no other known image has, or one layer",
		Args:  one("image, or the digest of a layer or diff"),
		RunE: func(cmd *cobra.Command, args []string) error {
			layers, err := client().Remove(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			for _, l := range layers {
				fmt.Fprintf(cmd.OutOrStdout(), "removed: %s\n", l)
			}
			if len(layers) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing is removed: other images have all of its layers, or its layers are not stored")
			}
			return nil
		},
	}, &cobra.Command{
		Use:   "pin IMAGE",
		Short: "Exclude a stored image from eviction, also after restarts",
		Args:  one("image"),
		RunE:  func(cmd *cobra.Command, args []string) error { return client().Pin(cmd.Context(), args[0]) },
	}, &cobra.Command{
		Use:   "unpin IMAGE",
		Short: "Take a pin back",
		Args:  one("image"),
		RunE:  func(cmd *cobra.Command, args []string) error { return client().Unpin(cmd.Context(), args[0]) },
	})
	return cmd
}

func writeStored(w io.Writer, layers []control.StoredLayer) error {
	if len(layers) == 0 {
		fmt.Fprintln(w, "nothing is stored")
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "LAYER\tSIZE\tUSED\tPINNED\tIMAGES\tORIGINS")
	several := func(list []string) string {
		switch len(list) {
		case 0:
			return "-"
		case 1, 2:
			return strings.Join(list, ", ")
		}
		return fmt.Sprintf("%s and %d more", list[0], len(list)-1)
	}
	for _, l := range layers {
		pinned := "-"
		if l.Pinned {
			pinned = "pinned"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", l.Layer, units.BytesSize(float64(l.Size)), l.Used.UTC().Format(time.DateTime), pinned, several(l.Images), several(l.Origins))
	}
	return tw.Flush()
}
