package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/shoalfs/shoal/deploy"
)

// nodeUnit is the unit file of a node with this directory for the program, and this root.
func nodeUnit(binDir, root string) string {
	return strings.NewReplacer(
		"ExecStart="+deploy.ProgramPath+" ", "ExecStart="+filepath.Join(binDir, "shoal")+" ",
		"RequiresMountsFor="+deploy.NodeRoot+"\n", requiresMountsFor(root)+"\n",
	).Replace(deploy.NodeUnit)
}

// requiresMountsFor is the line of a unit that starts after the disk with root is mounted,
// and only then: on the empty directory below it, the unit would find a new machine. systemd
// does not follow symbolic links, so the line has where they lead to, too.
func requiresMountsFor(root string) string {
	root = filepath.Clean(root)
	line := "RequiresMountsFor=" + unitWord(root)
	for dir, rest := root, ""; ; dir, rest = filepath.Dir(dir), filepath.Join(filepath.Base(dir), rest) {
		leads, err := filepath.EvalSymlinks(dir)
		if err != nil && dir != filepath.Dir(dir) {
			continue // it is not made yet
		}
		if leads = filepath.Join(leads, rest); err == nil && leads != root {
			line += " " + unitWord(leads)
		}
		return line
	}
}

// unitWord is a path in a unit file.
func unitWord(path string) string {
	if !strings.ContainsAny(path, " \t\"'\\%") {
		return path
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%").Replace(path) + `"`
}

// unit is a node that systemd runs.
type unit struct{ m *Machine }

func (u *unit) pid(ctx context.Context) (int, error) {
	out, err := u.m.run(ctx, "systemctl", "show", "--property=MainPID", "--value", unitName)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(out))
}

func (u *unit) start(ctx context.Context) error {
	_, err := u.m.run(ctx, "systemctl", "enable", "--now", unitName)
	return err
}

func (u *unit) restart(ctx context.Context) error {
	_, err := u.m.run(ctx, "systemctl", "restart", unitName)
	return err
}

func (u *unit) stop(ctx context.Context) error {
	if _, err := os.Stat(unitPath); errors.Is(err, fs.ErrNotExist) {
		// The file is gone already; what runs has to end.
		_, err := u.m.run(ctx, "systemctl", "stop", unitName)
		_, reload := u.m.run(ctx, "systemctl", "daemon-reload")
		return errors.Join(err, reload)
	}
	_, err := u.m.run(ctx, "systemctl", "disable", "--now", unitName)
	return err
}

func (u *unit) said(ctx context.Context) string {
	out, err := u.m.run(ctx, "journalctl", "--unit", unitName, "--lines", "20", "--output", "cat", "--no-pager")
	if err != nil {
		return fmt.Sprintf("(%v)", err)
	}
	return strings.TrimSpace(out)
}
