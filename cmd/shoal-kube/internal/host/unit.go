package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

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
