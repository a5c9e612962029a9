package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node"
	"github.com/shoalfs/shoal/cmd/shoal/internal/super"
	"github.com/shoalfs/shoal/internal/boltcheck"
	"github.com/shoalfs/shoal/internal/control"
)

// Exit statuses of shoal check, besides 0 (clean) and 1 (it could not be checked).
const (
	exitDamaged  = 2
	exitRepaired = 3
)

// exitError ends the program with a status of its own, when all has been said.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

func newCheckCommand() *cobra.Command {
	var socket, root, output string
	var repair bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the layers, databases and mounts on this disk, and repair them",
		Long: `Check reads all that a node or a supernode keeps on this machine's disk and compares
it with its digests: layers with their indexes and DiffIDs, the store of a
supernode with the digests of its chunks, and the databases and mounts.

If a daemon runs here, check asks the daemon, which lets reads of containers go first.
If no daemon runs, or --root is given, check reads the files itself. A running daemon
drops damaged chunks and fetches them again, also without --repair.

With --repair, damaged chunks are dropped (they are fetched again), damaged files and
databases are made again from what is there, and files that belong to nothing are
removed.

Exit status: 0 clean, 1 could not be checked, 2 damaged, 3 damaged and all of it
repaired.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if root != "" && socket != "" {
				return errors.New("--root checks a directory without a daemon, --control asks a daemon: give one of the two")
			}
			report, err := check(cmd, socket, root, repair)
			if err != nil {
				return err
			}
			return showReport(cmd.OutOrStdout(), report, output, repair)
		},
	}
	addControlFlag(cmd, &socket)
	cmd.Flags().StringVar(&root, "root", "", "data directory of a node or supernode that does not run")
	cmd.Flags().BoolVar(&repair, "repair", false, "repair what is damaged")
	addOutputFlag(cmd, &output)
	return cmd
}

// check asks the daemon, or looks by itself where none runs.
func check(cmd *cobra.Command, socket, root string, repair bool) (*control.CheckReport, error) {
	progress := func(what string) { fmt.Fprintln(cmd.ErrOrStderr(), "checking", what) }
	if root == "" {
		client := controlClient(socket)
		if socket != "" || exists(client.Path) {
			report, err := client.Check(cmd.Context(), control.CheckRequest{Repair: repair}, progress)
			if !errors.Is(err, control.ErrNoDaemon) || socket != "" {
				return report, err
			}
		}
		var err error
		if root, err = defaultRoot(); err != nil {
			return nil, err
		}
	}
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	return checkRoot(cmd.Context(), root, repair, progress, log)
}

// defaultRoot is where the config of this machine's node, or else of its supernode,
// says that its data is.
func defaultRoot() (string, error) {
	node, supernode := config.DefaultNode(), config.DefaultSupernode()
	if exists(nodeConfigPath) {
		if err := config.Load(nodeConfigPath, node); err != nil {
			return "", err
		}
	}
	if exists(supernodeConfigPath) {
		if err := config.Load(supernodeConfigPath, supernode); err != nil {
			return "", err
		}
	}
	for _, root := range []string{node.Root, supernode.Root} {
		if exists(root) {
			return root, nil
		}
	}
	return "", fmt.Errorf("neither %s nor %s is there: name the data directory with --root", node.Root, supernode.Root)
}

// showReport writes the report and turns it into an exit status.
func showReport(w io.Writer, r *control.CheckReport, output string, repair bool) error {
	err := show(w, output, r, func(w io.Writer, r *control.CheckReport) error { return writeReport(w, r, repair) })
	if err != nil {
		return err
	}
	switch r.Result {
	case control.Clean:
		return nil
	case control.Repaired:
		return &exitError{code: exitRepaired}
	default:
		return &exitError{code: exitDamaged}
	}
}

func writeReport(w io.Writer, r *control.CheckReport, repair bool) error {
	fmt.Fprintf(w, "%s", r.Role)
	if r.Root != "" {
		fmt.Fprintf(w, " at %s", r.Root)
	}
	fmt.Fprintf(w, ": %d layers (%d complete, %d proven), %d chunks (%s), %d mounts, %d databases, %d snapshots\n",
		r.Layers, r.Complete, r.Proven, r.Chunks, units.HumanSize(float64(r.Bytes)), r.Mounts, r.Databases, r.Snapshots)
	if len(r.Findings) > 0 {
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(tw, "\nWHERE\tPROBLEM\tREPAIRED")
		for _, f := range r.Findings {
			done := f.Repaired
			if done == "" {
				done = "no"
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\n", f.Where, f.Problem, done)
		}
		if err := tw.Flush(); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	switch {
	case r.Result == control.Damaged && !repair:
		fmt.Fprintln(w, "damaged: shoal check --repair repairs what it can")
	case r.Result == control.Damaged:
		fmt.Fprintln(w, "damaged: the findings with \"no\" could not be repaired")
	default:
		fmt.Fprintln(w, r.Result)
	}
	return nil
}

// checkRoot checks the data directory of a daemon that does not run.
func checkRoot(ctx context.Context, root string, repair bool, progress func(string), log *slog.Logger) (*control.CheckReport, error) {
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return nil, err
	}
	r := &control.CheckReport{Root: root, Findings: []blockdev.Finding{}}
	switch {
	case isDir(root, "diffs"):
		r.Role = "node"
		err = node.CheckRoot(ctx, r, root, repair, progress, log)
	case isDir(root, "store"):
		r.Role = "supernode"
		err = super.CheckRoot(ctx, r, root, repair, progress, log)
	default:
		return nil, fmt.Errorf("%s has neither the directory diffs of a node nor the directory store of a supernode: is it the right directory?", root)
	}
	if errors.Is(err, cache.ErrInUse) || errors.Is(err, boltcheck.ErrInUse) {
		return nil, fmt.Errorf("%s: a daemon uses it: check it through the daemon, without --root (with --control if its socket is not the default one): %w", root, err)
	}
	if err != nil {
		return nil, err
	}
	r.Judge(repair)
	return r, nil
}

// isDir says whether there is such a directory.
func isDir(path ...string) bool {
	fi, err := os.Stat(filepath.Join(path...))
	return err == nil && fi.IsDir()
}
