package host

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/template"
	"time"

	"github.com/shoalfs/shoal/deploy"
)

// ErrInUse says that containers of the machine still run on shoal. The node goes on
// running for them, and is removed when they have ended.
var ErrInUse = errors.New("containers still need shoal")

const (
	// inUse is the exit status of shoal install containerd --uninstall as long as
	// containers need the node.
	inUse = 3

	removeUnit = "shoal-uninstall.service"
	removePath = deploy.UnitDir + "/" + removeUnit
	// removalTime is how long the files may take to go once nothing is in use.
	removalTime = 2 * time.Minute
	// umountLimit is in seconds, keepLimit in tenths of a second (removal).
	umountLimit, keepLimit = 10, 900
)

// names of what a node makes below its root. A damaged one gets the suffix ".damaged", and
// one that was being written when the node ended begins with a dot.
var names = []string{
	"diffs", "tmp", "lock", "open", "quarantine", // blockdev/cache
	"fuse", "m", "lazy", "probe", // blockdev/volume
	"s", "l", "scratch", "metadata.db", "shoal.db", // snapshotter
	"identity", "mirror-ca.pem", "mirror-ca.key", "supernode", // cmd/shoal/internal/node
}

// removeScript removes the node and its files as soon as no container needs them. It is a
// process of the machine, which needs no pod.
//
//go:embed uninstall.sh
var removeScript string

var removeTemplate = template.Must(template.New("uninstall.sh").Funcs(template.FuncMap{"quote": quote}).Parse(removeScript))

// quote is a word of the shell.
func quote(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }

// removal is what the script needs.
type removal struct {
	// Script is the script's own path. Failed is a file in which it says why it cannot go
	// on.
	Script, Failed string
	// Shoal and Args are the command that succeeds when no container needs the node.
	Shoal string
	Args  []string
	// Control is the socket at which a node answers as long as it runs.
	Control string
	// Systemd says that it runs the node as the unit Node, and the script as the unit Own.
	// Otherwise Keep is the process that runs the node; 0: none.
	Systemd   bool
	Node, Own string
	Keep      int
	// Root is the node's directory without symbolic links, Link its path in the config.
	Root, Link string
	// Names are those of the files and directories that the node makes below Root.
	Names []string
	// Files go, and after them Last: what another run needs. Dirs go if they are empty then.
	Files, Last, Dirs []string
	// Limit is the time for one umount in seconds, Tenths that for the end of Keep.
	Limit, Tenths int
}

// Mounted is Root as it is in mountinfo.
func (r removal) Mounted() string {
	return strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(r.Root)
}

func (r removal) String() string {
	var text strings.Builder
	_ = removeTemplate.Execute(&text, r) // it takes each removal
	return text.String()
}

func (m *Machine) script() string { return m.etc("uninstall.sh") }

// failed is where the script says why it could not go on.
func (m *Machine) failed() string { return m.etc("uninstall.failed") }

// Uninstall takes shoal off the machine: containerd's config first, then the node and its
// files. If containers still run from lazy images, then the error wraps ErrInUse, and the
// rest goes when they have ended.
func (m *Machine) Uninstall(ctx context.Context, d Desired) error {
	b, err := os.ReadFile(m.etc("node.toml"))
	if errors.Is(err, fs.ErrNotExist) {
		m.Log.Info("shoal is not installed on this machine")
		return nil
	}
	if err != nil {
		return err
	}
	set, err := readSettings(string(b))
	if err != nil {
		return err
	}
	shoal := filepath.Join(d.BinDir, "shoal")
	args := append([]string{"install", "containerd", "--uninstall", "--node-config", m.etc("node.toml")}, d.Containerd...)
	env, err := m.environment()
	if err != nil {
		return err
	}
	out, err := m.runWith(ctx, env, shoal, append(args, d.restart()...)...) // it fetches layers
	m.log(out)
	var status *exec.ExitError
	used := errors.As(err, &status) && status.ExitCode() == inUse
	if err != nil && !used {
		return err
	}
	if err := m.remove(ctx, set, shoal, args); err != nil {
		return err
	}
	if used {
		return ErrInUse
	}
	for until := time.Now().Add(removalTime); ; {
		if why, err := os.ReadFile(m.failed()); err == nil && len(why) > 0 {
			return errors.New(strings.TrimSpace(string(why)))
		}
		if _, err := os.Lstat(m.script()); errors.Is(err, fs.ErrNotExist) {
			m.Log.Info("shoal is removed from this machine")
			if left, err := filepath.Glob(filepath.Join(set.Root, "*")); err == nil && len(left) > 0 {
				m.Log.Warn("below the node's directory are files that shoal did not make; they stay", "files", left)
			}
			return nil
		}
		if time.Now().After(until) {
			return fmt.Errorf("%s does not end; its output is in %s, or in the journal of %s", m.script(), logPath, removeUnit)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// remove starts the script.
func (m *Machine) remove(ctx context.Context, set settings, shoal string, args []string) error {
	k := &kept{m: m, shoal: shoal}
	keep, _, err := k.find()
	if err != nil {
		return err
	}
	root, err := filepath.EvalSymlinks(set.Root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	root = cmp.Or(root, set.Root)
	both := func(paths ...string) (all []string) {
		for _, path := range paths {
			all = append(all, path, earlier(path)) // an installation may have been killed
		}
		return all
	}
	// Other programs' files may be beside the sockets.
	r := removal{
		Script: m.script(), Failed: m.failed(), Shoal: shoal, Args: args, Control: set.ControlAddress,
		Systemd: systemd(), Node: unitName, Own: removeUnit, Keep: keep, Root: root, Link: set.Root, Names: names,
		Files: append(both(unitPath, m.etc("token")), set.Address, set.ControlAddress),
		Last:  append(both(m.etc("node.toml"), shoal), removePath),
		Dirs:  []string{filepath.Dir(set.Address), filepath.Dir(set.ControlAddress), m.etc("")},
		Limit: umountLimit, Tenths: keepLimit,
	}
	if err := os.Remove(m.failed()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeFile(m.script(), []byte(r.String()), 0o700); err != nil {
		return err
	}
	if systemd() {
		if err := writeFile(removePath, []byte(m.removeUnitText(set.Root)), 0o644); err != nil {
			return err
		}
		_, reload := m.run(ctx, "systemctl", "daemon-reload")
		_, enable := m.run(ctx, "systemctl", "enable", "--now", removeUnit)
		return errors.Join(reload, enable)
	}
	if err := m.endScript(ctx); err != nil {
		return err
	}
	return m.background("/bin/sh", m.script())
}

// removeUnitText is the unit that runs the script, for a node with this root.
func (m *Machine) removeUnitText(root string) string {
	return "[Unit]\nDescription=removes shoal when no container needs it any more\nAfter=containerd.service " + unitName + "\n" +
		requiresMountsFor(root) + "\n\n" +
		"[Service]\nType=exec\nEnvironmentFile=-" + m.etc("env") + "\nExecStart=/bin/sh " + m.script() + "\n\n[Install]\nWantedBy=multi-user.target\n"
}

// endScript ends a script that waits for containers, on a machine without systemd: it would
// disturb another one, or an installation.
func (m *Machine) endScript(ctx context.Context) error {
	for {
		found := 0
		err := processes(func(pid int, args []string) error {
			if len(args) != 2 || filepath.Base(args[0]) != "sh" || args[1] != m.script() {
				return nil
			}
			found = pid
			_ = syscall.Kill(-pid, syscall.SIGTERM) // background has made a group of it and what it runs
			return syscall.Kill(pid, syscall.SIGTERM)
		})
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end %s (process %d): %w", m.script(), found, err)
		}
		if found == 0 {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s (process %d) does not end: %w", m.script(), found, ctx.Err())
		}
	}
}

// stay takes back a removal that waits for containers, or for the end of a mount.
func (m *Machine) stay(ctx context.Context) error {
	if _, err := os.Lstat(m.script()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	m.Log.Info("the removal of shoal, which has not ended, is taken back")
	if !systemd() {
		if err := m.endScript(ctx); err != nil {
			return err
		}
	} else if _, err := os.Lstat(removePath); err == nil {
		if _, err := m.run(ctx, "systemctl", "disable", "--now", removeUnit); err != nil {
			return err
		}
	}
	for _, path := range []string{removePath, m.failed(), m.script()} { // the script last: this can be done again
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// background starts a process of the machine that outlives the pod, and logs beside the
// node.
func (m *Machine) background(name string, args ...string) error {
	if err := leaveCgroups(); err != nil {
		return err
	}
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	env, err := m.environment()
	if err != nil {
		return err
	}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir, cmd.Env = log, log, "/", env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // it mostly outlives this process
	return nil
}
