package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/host"
	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/join"
	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/retire"
)

// zoneLabel is Kubernetes' own.
const zoneLabel = "topology.kubernetes.io/zone"

// installOptions are the flags of shoal-kube install.
type installOptions struct {
	join, revision, config, rackLabel, program string
	elsewhere                                  []string
	wait                                       time.Duration
	uninstall                                  bool
	desired                                    host.Desired
}

func newInstallCommand() *cobra.Command {
	var o installOptions
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the node on the machine that this pod runs on, or bring it up to date",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&o.join, "join", "", "Secret with the token, and with the addresses of the supernodes")
	f.StringVar(&o.revision, "revision", "", "what the Secret's token and addresses have to be for; prepare writes it")
	f.StringArrayVar(&o.elsewhere, "supernode", nil, "address (ID@host:port) of a supernode that runs elsewhere")
	f.StringVar(&o.config, "config", "", "file with keys of node.toml")
	f.StringVar(&o.rackLabel, "rack-label", "", "label of the machine that says in which rack it is")
	f.StringVar(&o.program, "program", "/usr/local/bin/shoal", "the program to install")
	f.DurationVar(&o.wait, "wait", 5*time.Minute, "how long to wait for the supernodes' addresses")
	f.StringVar(&o.desired.BinDir, "bin-dir", "/usr/local/bin", "the machine's directory for the program")
	f.StringArrayVar(&o.desired.Containerd, "containerd", nil, "further flag of shoal install containerd")
	f.StringVar(&o.desired.Restart, "containerd-restart", "", "shell command that restarts containerd; empty: systemctl")
	f.BoolVar(&o.uninstall, "uninstall", false, "take the node off the machine")
	cmd.AddCommand(newHostCommand("on-machine", (*host.Machine).Install), newHostCommand("off-machine",
		func(m *host.Machine, ctx context.Context, d host.Desired, _ string) error { return m.Uninstall(ctx, d) }))
	return cmd
}

// newHostCommand is what Enter starts on the machine. It reads host.Desired as JSON, and
// its descriptor 3 is the program.
func newHostCommand(use string, do func(*host.Machine, context.Context, host.Desired, string) error) *cobra.Command {
	return &cobra.Command{
		Use:    use,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var d host.Desired
			if err := json.NewDecoder(cmd.InOrStdin()).Decode(&d); err != nil {
				return err
			}
			m := &host.Machine{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
			err := do(m, cmd.Context(), d, "/proc/self/fd/3")
			if errors.Is(err, host.ErrInUse) {
				return &exitError{error: err, code: retire.InUse}
			}
			return err
		},
	}
}

func (o installOptions) run(ctx context.Context) error {
	if o.uninstall {
		return o.enter(ctx, "off-machine")
	}
	client, err := newClient("")
	if err != nil {
		return err
	}
	info, err := o.info(ctx, client.Secrets(os.Getenv("POD_NAMESPACE")))
	if err != nil {
		return err
	}
	node, err := client.Nodes().Get(ctx, os.Getenv("NODE_NAME"), metav1.GetOptions{})
	if err != nil {
		return err
	}
	operator, err := os.ReadFile(o.config)
	if err != nil {
		return err
	}
	if o.desired.Config, err = nodeConfig(string(operator), info, node.Labels, o.rackLabel); err != nil {
		return fmt.Errorf("node.config of the values: %w", err)
	}
	o.desired.Token = info.Token
	return o.enter(ctx, "on-machine")
}

// info is what the machine needs to join.
func (o installOptions) info(ctx context.Context, secrets join.Secrets) (info join.Info, err error) {
	if len(o.elsewhere) > 0 {
		info.Supernodes = o.elsewhere
		info.Token, err = join.Token(ctx, secrets, o.join)
		return info, err
	}
	ctx, cancel := context.WithTimeout(ctx, o.wait)
	defer cancel()
	said := ""
	return join.Read(ctx, secrets, o.join, o.revision, func(err error) {
		if said != err.Error() {
			said = err.Error()
			slog.Info("waiting for the supernodes", "error", err)
		}
	})
}

// nodeConfig is node.toml of a machine with these labels. What the operator says of zone
// and rack counts before the labels.
func nodeConfig(operator string, info join.Info, labels map[string]string, rackLabel string) (string, error) {
	places := map[string]any{}
	if zone := labels[zoneLabel]; zone != "" {
		places["zone"] = zone
	}
	if rack := labels[rackLabel]; rackLabel != "" && rack != "" {
		places["rack"] = rack
	}
	return join.Compose(operator, map[string]any{"version": 1, "supernodes": info.Supernodes}, places)
}

// enter goes on as a process of the machine.
func (o installOptions) enter(ctx context.Context, command string) error {
	program, err := os.Open(o.program)
	if err != nil {
		return err
	}
	defer program.Close()
	in, err := json.Marshal(o.desired)
	if err != nil {
		return err
	}
	err = host.Enter(ctx, bytes.NewReader(in), os.Stdout, os.Stderr, []*os.File{program}, "install", command)
	var status *exec.ExitError
	if errors.As(err, &status) {
		return &exitError{error: err, code: status.ExitCode(), said: true}
	}
	return err
}
