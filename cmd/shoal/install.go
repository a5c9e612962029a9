package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

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
	distribution, config, node, program, service, command, address, to string
	dryRun, restart, uninstall, force                                  bool
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

Some distributions of Kubernetes keep containerd's config elsewhere, or write it again
at each start: k3s, RKE2, EKS, GKE, AKS, kind and others. Install recognizes them by
their files and changes what lasts; --distribution says which one it is. Without
--distribution, a --config means a containerd of no distribution.

With --uninstall, every image that containerd has lazily is first fetched and unpacked
for another snapshotter, the sandbox (pause) image too, so that pods go on starting.
Then the marked lines are removed. Credentials for private images are taken from
docker_config of the node's config. If containers still run from lazy images, then the
sections that make the node known to containerd stay, since without them containerd
cannot remove these containers; the exit status is 3. Leave the node running, and run
the command again when these containers have been removed.

What install cannot edit safely stays as it is, and the error names the lines to add.`,
		Example: `  shoal install containerd --dry-run
  shoal install containerd --restart
  shoal install containerd --uninstall --restart`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runInstall(cmd, o) },
	}
	f := containerd.Flags()
	f.StringVar(&o.distribution, "distribution", "", "where containerd's files are: "+strings.Join(install.Names(), ", ")+"; if empty, then by what is on the disk")
	f.StringVar(&o.config, "config", "", "containerd's config file; this flag and the next three have defaults by distribution")
	f.StringVar(&o.node, "node-config", nodeConfigPath, "the node's config file; if it does not exist, the defaults")
	f.StringVar(&o.program, "containerd", "", "containerd's program, which shows its version and checks the new config")
	f.StringVar(&o.address, "address", "", "containerd's socket, for --uninstall and --restart")
	f.StringVar(&o.service, "service", "", "systemd's name of containerd, for --restart")
	f.StringVar(&o.command, "restart-command", "", "shell command for --restart, instead of systemctl")
	f.StringVar(&o.to, "snapshotter", "overlayfs", "the snapshotter that images are unpacked for with --uninstall")
	f.BoolVar(&o.dryRun, "dry-run", false, "show what would change, and change nothing")
	f.BoolVar(&o.restart, "restart", false, "restart containerd at the end, if it does not run with this config yet; containers go on running")
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
	h, err := o.host(n)
	if err != nil {
		return err
	}
	var plan install.Plan
	users := 0
	if o.uninstall {
		if err := moveImages(ctx, w, o, h, c); err != nil {
			return err
		}
		if !o.dryRun {
			users, err = install.Users(ctx, h.Socket, "shoal")
			if err != nil && !o.force {
				return err
			}
			if err != nil {
				fmt.Fprintf(w, "note: containers that use shoal, if there are any, have to be removed before containerd starts without it: %v\n", err)
			}
		}
		plan, err = install.Remove(h, n, users > 0)
	} else {
		var version install.Version
		if version, err = containerdVersion(ctx, h.Program); err != nil {
			return err
		}
		var command []string
		if command, err = o.again(cmd); err != nil {
			return err
		}
		plan, err = install.Containerd(h, version, n, command...)
	}
	if err != nil {
		return err
	}
	if h.Name != "" {
		fmt.Fprintf(w, "distribution %s\n", h.Name)
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
		if s := h.Snippet(n); s != "" && !o.uninstall {
			fmt.Fprintf(w, "%s", s)
		}
		return nil
	}
	if err := plan.Apply(); err != nil {
		return err
	}
	if !o.uninstall {
		if err := takenIn(ctx, h, plan); err != nil {
			return err
		}
	}
	reload(ctx, w, h, plan)
	known := !o.uninstall || users > 0
	restarted, err := restart(ctx, w, o, h, plan, known)
	if err == nil && restarted {
		err = confirm(ctx, h, known, startTime)
	}
	if err != nil || users == 0 {
		return err
	}
	fmt.Fprintf(w, "%d containers still use shoal. Leave the node running, and run this command again when they have been removed.\n", users)
	return &exitError{code: exitUsed}
}

// startTime is how long containerd may take to answer after a restart.
const startTime = time.Minute

// exitUsed is the exit status of an uninstallation that containers delay.
const exitUsed = 3

// host is the machine that install runs on, with what flags say instead.
func (o installOptions) host(n install.Node) (install.Host, error) {
	name := o.distribution
	if name == "" && o.config != "" {
		name = "containerd"
	}
	h, err := install.Detect("/", name)
	if err != nil {
		return h, err
	}
	if err := h.Refused(n); err != nil && o.uninstall {
		return h, fmt.Errorf("%w: remove shoal's lines where containerd's config is made from", install.ErrUnsupported)
	} else if err != nil {
		return h, err
	}
	for _, f := range []struct {
		flag string
		to   *string
	}{{o.config, &h.Config}, {o.program, &h.Program}, {o.address, &h.Socket}} {
		if f.flag != "" {
			*f.to = f.flag
		}
	}
	if h.Config, err = filepath.Abs(h.Config); err != nil {
		return h, err
	}
	h.Record = filepath.Join(filepath.Dir(o.node), install.RecordName)
	if o.service != "" {
		h.Services = []string{o.service}
	}
	return h, nil
}

// again is the command that makes the same changes at containerd's next start.
func (o installOptions) again(cmd *cobra.Command) ([]string, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	command := []string{program, "install", "containerd"}
	for _, name := range []string{"distribution", "config", "node-config", "containerd"} {
		f := cmd.Flag(name)
		if !f.Changed {
			continue
		}
		value := f.Value.String()
		if name == "config" || name == "node-config" { // systemd has another working directory
			if value, err = filepath.Abs(value); err != nil {
				return nil, err
			}
		}
		command = append(command, "--"+name+"="+value)
	}
	return command, nil
}

// reload has systemd read the settings of containerd's unit again, if they have changed:
// otherwise the next start of containerd would do what the old ones say.
func reload(ctx context.Context, w io.Writer, h install.Host, plan install.Plan) {
	if !slices.ContainsFunc(plan.Changes, func(c install.Change) bool { return c.Path == h.Unit }) {
		return
	}
	if err := systemctl(ctx, "daemon-reload"); err != nil {
		fmt.Fprintf(w, "note: %v. Run it before containerd is restarted\n", err)
	}
}

// systemctl runs systemctl. An error has what it says.
func systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// restart has containerd read its config, if it has not yet. known says whether containerd
// is to know the node then.
func restart(ctx context.Context, w io.Writer, o installOptions, h install.Host, plan install.Plan, known bool) (restarted bool, err error) {
	// containerd does not read the list.
	changed := slices.ContainsFunc(plan.Changes, func(c install.Change) bool { return c.Path != h.Record })
	switch {
	case !o.restart && changed:
		fmt.Fprintln(w, "Restart containerd to use the new config; containers go on running.")
		return false, nil
	case !o.restart:
		return false, nil
	case !changed:
		// If it does not answer, then it does not know the node.
		if knows, _ := install.Runs(ctx, h.Socket, "shoal"); knows == known {
			fmt.Fprintln(w, "containerd runs with this config already, so it is not restarted")
			return false, nil
		}
	}
	if o.command != "" {
		if out, err := exec.CommandContext(ctx, "sh", "-c", o.command).CombinedOutput(); err != nil { //nolint:gosec // the operator's
			return false, fmt.Errorf("the files are written, but the command that restarts containerd failed: %w: %s. Restart containerd by hand", err, bytes.TrimSpace(out))
		}
		fmt.Fprintln(w, "containerd is restarted")
		return true, nil
	}
	service := h.Services[0]
	for _, s := range h.Services[1:] {
		if systemctl(ctx, "is-active", "--quiet", s) == nil {
			service = s
		}
	}
	if err := systemctl(ctx, "restart", service); err != nil {
		return false, fmt.Errorf("the files are written, but %w. Restart containerd by hand", err)
	}
	fmt.Fprintf(w, "%s is restarted\n", service)
	return true, nil
}

// confirm waits until containerd answers after a restart, and says whether it has read the
// config.
func confirm(ctx context.Context, h install.Host, known bool, limit time.Duration) error {
	for until := time.Now().Add(limit); ; {
		knows, err := install.Runs(ctx, h.Socket, "shoal")
		switch {
		case err == nil && knows == known:
			return nil
		case time.Now().Before(until):
		case err != nil:
			return fmt.Errorf("the files are written and containerd was restarted, but it does not answer: %w. Its log says why; "+
				"or name its socket with --address. To take the changes back, run this command with --uninstall --force --restart", err)
		case known:
			return fmt.Errorf("containerd was restarted and does not know shoal, so it reads another file than %s. Its command line names the file: "+
				"run this command with --uninstall --restart, and install with --config and that file", h.Config)
		default:
			return fmt.Errorf("containerd was restarted and still knows shoal: remove the section proxy_plugins.shoal from the file that it reads, which is not %s", h.Config)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// containerdVersion asks containerd's program for its version.
func containerdVersion(ctx context.Context, program string) (v install.Version, err error) {
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return v, fmt.Errorf("%s --version: %w. Name containerd's program with --containerd", program, err)
	}
	f := strings.Fields(string(out))
	if len(f) > 2 {
		_, err = fmt.Sscanf(strings.TrimPrefix(f[2], "v"), "%d.%d", &v.Major, &v.Minor)
	}
	if err != nil || v.Major == 0 {
		return v, fmt.Errorf("%s --version says %q, which is not a version of containerd", program, bytes.TrimSpace(out))
	}
	return v, nil
}

// takenIn has containerd read its config, and takes the change back if containerd does not
// like it or does not see it.
func takenIn(ctx context.Context, h install.Host, plan install.Plan) error {
	out, err := exec.CommandContext(ctx, h.Program, "--config", h.Config, "config", "dump").Output()
	var failed *exec.ExitError
	switch {
	case errors.As(err, &failed):
		err = fmt.Errorf("%s cannot read its config after the change: %w: %s", h.Program, err, bytes.TrimSpace(failed.Stderr))
	case err != nil:
		err = fmt.Errorf("%s config dump: %w", h.Program, err)
	case !install.Sees(out):
		err = fmt.Errorf("%s reads its config, but does not see shoal in it: another file that the config imports overrides it", h.Program)
	default:
		return nil
	}
	return errors.Join(fmt.Errorf("%w. The changes were undone", err), plan.Undo())
}

// moveImages is the first part of --uninstall.
func moveImages(ctx context.Context, w io.Writer, o installOptions, h install.Host, c *config.Node) error {
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
	err := install.MoveImages(ctx, h.Socket, "shoal", o.to, resolver, func(namespace, image string, err error) {
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
