// Package host puts shoal on a machine, and takes it off: program, unit, token and config
// of the node, and containerd's config. It runs as a process of the machine (Enter).
//
// # Invariants
//
//   - Nothing is started again unless what it runs from has changed. A run that changes
//     nothing changes nothing.
//   - Each file is replaced by a rename, after the new program has found its config right.
//   - If the node does not get up with what is new, then it is started with what was
//     there before, and Install fails.
//   - The node is never stopped while a container needs it.
package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/shoalfs/shoal/deploy"
)

// Desired is what a machine is to have.
type Desired struct {
	// Config is node.toml, and Token what the node joins with.
	Config, Token string
	// BinDir is the directory for the program.
	BinDir string
	// Containerd are further flags of shoal install containerd.
	Containerd []string
	// Restart is a shell command that restarts containerd; empty: systemctl.
	Restart string
}

// restart are the flags by which containerd is restarted.
func (d Desired) restart() []string {
	if d.Restart == "" {
		return []string{"--restart"}
	}
	return []string{"--restart", "--restart-command", d.Restart}
}

// Machine is the one that this process runs on.
type Machine struct {
	Log *slog.Logger
	// Etc is the directory of the node's files; empty: /etc/shoal.
	Etc string
	// UpTimeout is how long a node may take to get up; 0: 90 seconds.
	UpTimeout time.Duration
}

const (
	unitName  = deploy.NodeUnitName
	unitPath  = deploy.UnitDir + "/" + unitName
	upTimeout = 90 * time.Second
	// header is the first line of a node.toml that is not the operator's.
	header = "# Written by shoal-kube from the values of the chart. Changes of this file are lost: change node.config of the values.\n"
	// copySuffix names the copy of a node.toml that the operator wrote.
	copySuffix = ".before-chart"
)

func (m *Machine) etc(name string) string {
	if m.Etc != "" {
		return filepath.Join(m.Etc, name)
	}
	return filepath.Join("/etc/shoal", name)
}

// settings are the keys of a node.toml that matter here.
type settings struct {
	Root           string `toml:"root"`
	Address        string `toml:"address"`
	ControlAddress string `toml:"control_address"`
}

func readSettings(config string) (settings, error) {
	s := settings{Root: deploy.NodeRoot, Address: "/run/shoal/shoal.sock", ControlAddress: "/run/shoal/control.sock"}
	err := toml.Unmarshal([]byte(config), &s)
	return s, err
}

// service is what runs the node: systemd, or shoal keep.
type service interface {
	// pid is the node's process; 0: it does not run.
	pid(ctx context.Context) (int, error)
	// start starts the node, now and at each boot, if that is possible.
	start(ctx context.Context) error
	// restart has the node run the program and the settings that are there now.
	restart(ctx context.Context) error
	// stop ends the node for good.
	stop(ctx context.Context) error
	// said is the end of what the node has logged.
	said(ctx context.Context) string
}

// Install makes the machine be as desired. program is a file with the program.
func (m *Machine) Install(ctx context.Context, d Desired, program string) error {
	set, err := readSettings(d.Config)
	if err != nil {
		return fmt.Errorf("node.config: %w", err)
	}
	staged, err := stage(program, d.BinDir)
	if err != nil {
		return err
	}
	defer staged.drop()
	files := m.files(d, set)
	if err := m.stay(ctx); err != nil {
		return err
	}
	if err := m.adopt(set); err != nil {
		return err
	}
	if err := m.check(ctx, staged.path, d.Config); err != nil {
		return err
	}
	shoal := filepath.Join(d.BinDir, "shoal")
	s := m.service(shoal)
	pid, err := s.pid(ctx)
	if err != nil {
		return err
	}
	restart := pid != 0 && !staged.isRunBy(pid)
	changed, err := m.replace(files, staged)
	if err != nil {
		return errors.Join(err, changed.undo())
	}
	if changed[unitPath] != nil {
		if _, err := m.run(ctx, "systemctl", "daemon-reload"); err != nil {
			return errors.Join(err, changed.undo())
		}
		restart = restart || pid != 0
	}
	if err := m.bringUp(ctx, s, shoal, set.ControlAddress, pid, restart); err != nil {
		m.Log.Error("the node does not get up; what was there before is started again", "error", err)
		err = fmt.Errorf("the node does not get up: %w; its log ends:\n%s", err, s.said(ctx))
		return errors.Join(err, m.goBack(ctx, s, changed))
	}
	changed.forget()
	return m.configureContainerd(ctx, shoal, d)
}

// bringUp starts the node, or has it take over what is new, and waits until it answers.
func (m *Machine) bringUp(ctx context.Context, s service, shoal, control string, pid int, restart bool) error {
	wait := m.UpTimeout
	if wait == 0 {
		wait = upTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	switch {
	case pid == 0:
		m.Log.Info("starting the node")
		if err := s.start(ctx); err != nil {
			return err
		}
	case restart:
		m.Log.Info("restarting the node")
		if err := s.restart(ctx); err != nil {
			return err
		}
	default:
		// What the config file says and the running node does not do.
		out, err := m.run(ctx, shoal, "reload", "--control", control)
		if err != nil {
			return err
		}
		if strings.Contains(out, "needs a restart: ") {
			m.Log.Info("restarting the node for its config", "keys", strings.TrimSpace(out))
			if err := s.restart(ctx); err != nil {
				return err
			}
		}
	}
	return m.up(ctx, shoal, control)
}

// up waits until the node answers.
func (m *Machine) up(ctx context.Context, shoal, control string) error {
	for {
		_, err := m.run(ctx, shoal, "status", "--control", control)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// goBack gives the machine what it had before.
func (m *Machine) goBack(ctx context.Context, s service, changed changes) error {
	if len(changed) == 0 {
		return nil
	}
	first := true
	for _, c := range changed {
		first = first && c.copy == ""
	}
	err := changed.undo()
	if first {
		return errors.Join(err, s.stop(ctx)) // there was no node before
	}
	if changed[unitPath] != nil {
		_, reload := m.run(ctx, "systemctl", "daemon-reload")
		err = errors.Join(err, reload)
	}
	return errors.Join(err, s.restart(ctx))
}

// configureContainerd has containerd use the node.
func (m *Machine) configureContainerd(ctx context.Context, shoal string, d Desired) error {
	args := append([]string{"install", "containerd", "--node-config", m.etc("node.toml")}, d.Containerd...)
	out, err := m.run(ctx, shoal, append(args, d.restart()...)...)
	m.log(out)
	return err
}

// adopt keeps a copy of a node.toml that the operator wrote. The chart's values count
// from then on, but not for the directory that has the images: what containers run from
// would be lost.
func (m *Machine) adopt(set settings) error {
	path := m.etc("node.toml")
	old, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && strings.HasPrefix(string(old), header) {
		return nil
	}
	if err != nil {
		return err
	}
	before, err := readSettings(string(old))
	if err != nil {
		return fmt.Errorf("%s: %w: mend the file or remove it", path, err)
	}
	if before.Root != set.Root {
		return fmt.Errorf("%s, which is not the chart's, has root = %q: say so in node.config of the values, or uninstall that node first", path, before.Root)
	}
	m.Log.Info("the chart's values count from now on, and not those of the file that was there; a copy stays", "copy", path+copySuffix)
	return link(path, path+copySuffix) // Install replaces the file, and does not write into it
}

// check has the new program look at its config before anything is replaced.
func (m *Machine) check(ctx context.Context, program, config string) error {
	f, err := os.CreateTemp("", "node-*.toml")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	_, err = f.WriteString(config)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if _, err := m.run(ctx, program, "config", "check", "node", f.Name()); err != nil {
		if errors.Is(err, os.ErrPermission) { // its file system is mounted noexec
			return fmt.Errorf("%w: no program can be started from this directory: set node.binDir of the values to another one", err)
		}
		return fmt.Errorf("node.config of the values: %w", err)
	}
	return nil
}

// run runs a program and returns what it says. An error has its standard error.
func (m *Machine) run(ctx context.Context, name string, args ...string) (string, error) {
	return m.runWith(ctx, nil, name, args...)
}

// runWith is run with this environment; nil: that of this process.
func (m *Machine) runWith(ctx context.Context, env []string, name string, args ...string) (string, error) {
	var out, errs strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr, cmd.Env = &out, &errs, env
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// log logs what a program says, line by line.
func (m *Machine) log(out string) {
	for line := range strings.Lines(out) {
		if line = strings.TrimRight(line, "\n"); line != "" {
			m.Log.Info(line)
		}
	}
}

// service is the one of this machine.
func (m *Machine) service(shoal string) service {
	if systemd() {
		return &unit{m}
	}
	return &kept{m: m, shoal: shoal}
}

// systemd says whether it has started this machine: sd_booted(3).
func systemd() bool {
	st, err := os.Lstat("/run/systemd/system")
	return err == nil && st.IsDir()
}
