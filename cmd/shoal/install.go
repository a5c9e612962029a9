package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/install"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/mirror"
	"github.com/shoalfs/shoal/internal/registry/credentials"
)

// installOptions are the flags of shoal install containerd.
type installOptions struct {
	config, node, program, service, address, to string
	dryRun, restart, uninstall, force           bool
}

func newInstallCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Edit the config of containerd so that it uses the node on this machine",
		Args:  cobra.NoArgs,
	}
	var o installOptions
	containerd := &cobra.Command{
		Use:   "containerd",
		Short: "Edit containerd's config file and its hosts.toml, or undo the changes",
		Long: `Install edits the config file of containerd, or adds a file to a directory that the
config file imports, and adds the node's registry mirror to hosts.toml. Lines that
install adds are marked, all others stay as they are, and a copy of each file that
was changed is kept beside it (.before-shoal). Start the node first: the mirror needs
the certificate that the node makes at its first start.

With --uninstall, every image that containerd has lazily is first fetched and unpacked
for another snapshotter, the sandbox (pause) image too, so that pods go on starting.
Then the marked lines are removed. Credentials for private images are taken from
docker_config of the node's config.

What install cannot edit safely stays as it is, and the error names the lines to add.`,
		Example: `  shoal install containerd --dry-run
  shoal install containerd --restart
  shoal install containerd --uninstall --restart`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runInstall(cmd, o) },
	}
	f := containerd.Flags()
	f.StringVar(&o.config, "config", "/etc/containerd/config.toml", "containerd's config file")
	f.StringVar(&o.node, "node-config", nodeConfigPath, "the node's config file; if it does not exist, the defaults")
	f.StringVar(&o.program, "containerd", "containerd", "containerd's program, which shows its version and checks the new config")
	f.StringVar(&o.address, "address", "/run/containerd/containerd.sock", "containerd's socket, for --uninstall")
	f.StringVar(&o.service, "service", "containerd", "systemd's name of containerd, for --restart")
	f.StringVar(&o.to, "snapshotter", "overlayfs", "the snapshotter that images are unpacked for with --uninstall")
	f.BoolVar(&o.dryRun, "dry-run", false, "show what would change, and change nothing")
	f.BoolVar(&o.restart, "restart", false, "restart containerd at the end; containers go on running")
	f.BoolVar(&o.uninstall, "uninstall", false, "undo what install has done")
	f.BoolVar(&o.force, "force", false, "with --uninstall: go on if images cannot be moved to the other snapshotter")
	cmd.AddCommand(containerd)
	return cmd
}

func runInstall(cmd *cobra.Command, o installOptions) error {
	ctx, w := cmd.Context(), cmd.OutOrStdout()
	c := config.DefaultNode()
	if err := loadNamed(o.node, cmd.Flags().Changed("node-config"), c); err != nil {
		return err
	}
	n := install.Node{Socket: c.Address, Root: c.Root, Mirror: c.MirrorAddress}
	if !c.MirrorPlainHTTP {
		n.MirrorCA = filepath.Join(c.Root, mirror.CAFile)
	}
	var plan install.Plan
	var err error
	if o.uninstall {
		if err := moveImages(ctx, w, o, c); err != nil {
			return err
		}
		plan, err = install.Remove(o.config, n)
	} else {
		var version int
		if version, err = containerdVersion(ctx, o.program); err != nil {
			return err
		}
		plan, err = install.Containerd(o.config, version, n)
	}
	if err != nil {
		return err
	}
	for _, c := range plan.Changes {
		fmt.Fprint(w, c)
	}
	for _, note := range plan.Notes {
		fmt.Fprintf(w, "note: %s\n", note)
	}
	if len(plan.Changes) == 0 {
		fmt.Fprintln(w, "nothing to change")
	}
	if o.dryRun {
		return nil
	}
	if err := plan.Apply(); err != nil {
		return err
	}
	if !o.uninstall {
		if err := takenIn(ctx, o, plan); err != nil {
			return err
		}
	}
	switch {
	case o.restart:
		if out, err := exec.CommandContext(ctx, "systemctl", "restart", o.service).CombinedOutput(); err != nil {
			return fmt.Errorf("the files are written, but systemctl restart %s failed: %w: %s. Restart containerd by hand", o.service, err, bytes.TrimSpace(out))
		}
	case len(plan.Changes) > 0:
		fmt.Fprintln(w, "Restart containerd to use the new config; containers go on running.")
	}
	return nil
}

// containerdVersion is the version of the config file that the program's config
// default would have: 2 for containerd 1.x, 3 for 2.x.
func containerdVersion(ctx context.Context, program string) (int, error) {
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return 0, fmt.Errorf("%s --version: %w. Name containerd's program with --containerd", program, err)
	}
	if f := strings.Fields(string(out)); len(f) > 2 && strings.HasPrefix(strings.TrimPrefix(f[2], "v"), "1.") {
		return 2, nil
	}
	return 3, nil
}

// takenIn has containerd read its config, and takes the change back if containerd does not
// like it or does not see it.
func takenIn(ctx context.Context, o installOptions, plan install.Plan) error {
	out, err := exec.CommandContext(ctx, o.program, "--config", o.config, "config", "dump").Output()
	var failed *exec.ExitError
	switch {
	case errors.As(err, &failed):
		err = fmt.Errorf("%s cannot read its config after the change: %w: %s", o.program, err, bytes.TrimSpace(failed.Stderr))
	case err != nil:
		err = fmt.Errorf("%s config dump: %w", o.program, err)
	case !bytes.Contains(out, []byte("proxy_plugins.shoal")) || !bytes.Contains(bytes.ReplaceAll(out, []byte("'"), []byte(`"`)), []byte(`snapshotter = "shoal"`)):
		err = fmt.Errorf("%s reads its config, but does not see shoal in it: another file that the config imports overrides it", o.program)
	default:
		return nil
	}
	return errors.Join(fmt.Errorf("%w. The changes were undone", err), plan.Undo())
}

// moveImages is the first part of --uninstall.
func moveImages(ctx context.Context, w io.Writer, o installOptions, c *config.Node) error {
	if o.dryRun {
		fmt.Fprintf(w, "images that containerd has lazily would be fetched and unpacked for %s\n", o.to)
		return nil
	}
	keychain := credentials.NewDockerConfig(ctx, c.DockerConfig, nil)
	resolver := func(ctx context.Context, image string) (remotes.Resolver, error) {
		hosts := dockerconfig.HostOptions{Credentials: func(string) (string, string, error) {
			cred, err := keychain.Credential(ctx, image)
			return cred.Username, cred.Secret, err
		}}
		if dirs := filepath.SplitList(c.RegistryConfigPath); len(dirs) > 0 {
			hosts.HostDir = dockerconfig.HostDirFromRoot(dirs[0])
		}
		return docker.NewResolver(docker.ResolverOptions{Hosts: dockerconfig.ConfigureHosts(ctx, hosts)}), nil
	}
	err := install.MoveImages(ctx, o.address, "shoal", o.to, resolver, func(namespace, image string, err error) {
		if err == nil {
			fmt.Fprintf(w, "image %s (%s) is unpacked for %s\n", image, namespace, o.to)
		}
	})
	if err == nil {
		return nil
	}
	if !o.force {
		return fmt.Errorf("%w\nWithout these images pods may not start, so nothing was changed. Pull them for %s by hand "+
			"(ctr -n NAMESPACE images pull --snapshotter %s --user USER IMAGE), or remove them, or give --force", err, o.to, o.to)
	}
	fmt.Fprintf(w, "note: these images have to be pulled again: %v\n", err)
	return nil
}
