package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/internal/control"
)

func newMembersCommand() *cobra.Command {
	var client func() control.Client
	var output string
	cmd := &cobra.Command{
		Use:   "members",
		Short: "On a supernode: list its nodes, keep one out, or let it in again",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			list, err := client().Members(cmd.Context())
			if err != nil {
				return err
			}
			return show(cmd.OutOrStdout(), output, list, writeMembers)
		},
	}
	client = supernodeClient(cmd)
	addOutputFlag(cmd, &output)
	oneID := one("ID of a node, as `shoal members` lists it")
	cmd.AddCommand(&cobra.Command{
		Use:   "revoke ID",
		Short: "End a node's membership, and refuse its identity from then on",
		Args:  oneID,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := client().Revoke(cmd.Context(), args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is revoked. The node still has the token: replace the token, or the node can come back with another identity.\n", args[0])
			return nil
		},
	}, &cobra.Command{
		Use:   "allow ID",
		Short: "Take a revocation back",
		Args:  oneID,
		RunE:  func(cmd *cobra.Command, args []string) error { return client().Allow(cmd.Context(), args[0]) },
	})
	return cmd
}

func writeMembers(w io.Writer, list []control.Member) error {
	if len(list) == 0 {
		fmt.Fprintln(w, "no members")
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tADDRESS\tZONE\tRACK\tIMAGES\tSINCE\tSTATE")
	dash := func(s string) string {
		if strings.TrimSpace(s) == "" {
			return "-"
		}
		return s
	}
	for _, m := range list {
		since := "-"
		if m.State != "revoked" {
			since = (time.Duration(m.Seconds) * time.Second).String()
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", m.ID, dash(m.Address), dash(m.Zone), dash(m.Rack), m.Images, since, m.State)
	}
	return tw.Flush()
}
