package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/internal/control"
)

func newStatusCommand() *cobra.Command {
	var socket, output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show images, their layers, and how much of them is here",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			st, err := controlClient(socket).Status(cmd.Context())
			if err != nil {
				return err
			}
			return show(cmd.OutOrStdout(), output, st, writeStatus)
		},
	}
	addControlFlag(cmd, &socket)
	addOutputFlag(cmd, &output)
	return cmd
}

func addOutputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "table", "table or json")
}

// checkOutput refuses a value of --output that show does not know.
func checkOutput(output string) error {
	if output != "table" && output != "json" {
		return fmt.Errorf("--output is %q: it must be table or json", output)
	}
	return nil
}

// show writes v as --output says: as JSON, or as table writes it.
func show[T any](w io.Writer, output string, v T, table func(io.Writer, T) error) error {
	if output == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	return table(w, v)
}

// supernodeClient adds --control to a command for supernodes alone, and returns what makes a
// client of the socket that it names.
func supernodeClient(cmd *cobra.Command) func() control.Client {
	socket := cmd.PersistentFlags().String("control", "", "control socket of the supernode (default "+config.DefaultSupernode().ControlAddress+")")
	return func() control.Client {
		return control.Client{Path: cmp.Or(*socket, config.DefaultSupernode().ControlAddress)}
	}
}

// one wants one argument.
func one(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%d arguments are given: name one %s", len(args), what)
		}
		return nil
	}
}

func addControlFlag(cmd *cobra.Command, socket *string) {
	cmd.Flags().StringVar(socket, "control", "", "control socket of the daemon (default: the node's, else the supernode's)")
}

// controlClient finds the daemon on this machine where no socket is named: a
// node if there is one, else a supernode.
func controlClient(socket string) control.Client {
	if socket == "" {
		socket = config.DefaultNode().ControlAddress
		if _, err := os.Stat(socket); err != nil {
			if s := config.DefaultSupernode().ControlAddress; exists(s) {
				socket = s
			}
		}
	}
	return control.Client{Path: socket}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func writeStatus(w io.Writer, st *control.Status) error {
	fmt.Fprintf(w, "shoal %s, %s", st.Version, st.Role)
	if len(st.Supernodes) > 0 {
		fmt.Fprintf(w, ", supernode %s", strings.Join(st.Supernodes, ", "))
	}
	fmt.Fprint(w, "\n")
	if why, _, _ := strings.Cut(st.NoSupernode, "\n"); why != "" {
		fmt.Fprintf(w, "no supernode serves this node now: %s\n", why)
	}
	fmt.Fprintln(w)
	if len(st.Images) == 0 {
		fmt.Fprintln(w, "no images")
	} else if err := writeImages(w, st); err != nil {
		return err
	}
	return writeNotLazy(w, st.NotLazy)
}

// writeNotLazy lists the images that containerd unpacks. Of a reason
// the first line is enough here.
func writeNotLazy(w io.Writer, list []control.NotLazy) error {
	if len(list) == 0 {
		return nil
	}
	fmt.Fprint(w, "\nnot lazy:\n\n")
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "IMAGE\tPULLED\tCAUSE\tWHY")
	for _, n := range list {
		why, _, _ := strings.Cut(n.Why, "\n")
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", cmp.Or(n.Ref, "-"), n.At.Local().Format(time.DateTime), n.Cause, why)
	}
	return tw.Flush()
}

func writeImages(w io.Writer, st *control.Status) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	node := st.Role == "node"
	fmt.Fprint(tw, "IMAGE\tLAYERS\tSIZE\tLOCAL\tMOUNTED")
	if node {
		fmt.Fprint(tw, "\tPROVEN")
	}
	fmt.Fprintln(tw)
	for _, im := range st.Images {
		im.Sum() // also where an earlier version's daemon has not
		mounts, proofs := map[string]int{}, map[string]int{}
		users := 0
		for _, l := range im.Layers {
			mounts[l.Mount]++
			users = max(users, l.LazyUsers)
			proofs[l.Proof]++
		}
		fmt.Fprintf(tw, "%s\t%d\t%s\t%s\t%s", im.Ref, len(im.Layers), units.HumanSize(float64(im.Size)), percent(im.Local, im.Size), mountSummary(mounts, users))
		if node {
			fmt.Fprintf(tw, "\t%s", proofSummary(proofs, len(im.Layers)))
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush()
}

// percent rounds down: 100% is said only when every byte is there.
func percent(part, all int64) string {
	if all == 0 {
		return "100%"
	}
	return fmt.Sprintf("%d%%", part*100/all)
}

// mountSummary says how layers are mounted, and how many containers read at least one
// of them through FUSE.
func mountSummary(mounts map[string]int, users int) string {
	var parts []string
	for _, kind := range []string{"native", "lazy"} {
		if n := mounts[kind]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, kind))
		}
	}
	if len(parts) == 0 {
		return "-"
	}
	summary := strings.Join(parts, ", ")
	switch {
	case users == 1:
		summary += " (1 container lazy)"
	case users > 1:
		summary += fmt.Sprintf(" (%d containers lazy)", users)
	}
	return summary
}

// proofSummary says how many layers are known to be what the image config says.
func proofSummary(proofs map[string]int, layers int) string {
	switch n := proofs["proven"]; {
	case proofs["quarantined"] > 0:
		return "QUARANTINED"
	case n == layers:
		return "yes"
	default:
		return fmt.Sprintf("%d of %d", n, layers)
	}
}
