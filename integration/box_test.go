package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestBox: a box has files, mounts and processes that this machine does not see, and they
// are gone when it ends, also those that lost their parents.
func TestBox(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	n := must(l.NewNet(ctx, 1))(t)
	b := must(l.NewBox(ctx, must(n.NewHost(ctx, "box", 0, 0))(t), 256<<20))(t)
	noError(t, b.Write("/etc/shoal/box", "hello"))
	if got := must(b.Lab.Run(ctx, "cat", "/etc/shoal/box"))(t); got != "hello" {
		t.Errorf("in the box the file has %q", got)
	}
	if _, err := os.Stat("/etc/shoal/box"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("this machine has the box's file: %v", err)
	}
	const mounts = "mkdir /var/lib/m /run/m && mount -t tmpfs box-tmpfs /run/m && mount --bind /run/m /var/lib/m"
	must(b.Lab.Run(ctx, "sh", "-c", mounts))(t)
	if all := string(must(os.ReadFile("/proc/self/mountinfo"))(t)); strings.Contains(all, "box-tmpfs") {
		t.Error("this machine has the box's mounts")
	}
	p := must(b.Lab.Start("parent", "sh", nil, "-c", "(sleep 0.1 &); exec sleep 1000"))(t)
	noError(t, lab.WaitFor(ctx, "the end of an orphan", 20*time.Second, func() error {
		all, err := b.Lab.Run(ctx, "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null || true")
		switch {
		case err != nil:
			return err
		case strings.Contains(all, "(sleep) Z"):
			return errors.New("it is a zombie")
		case strings.Count(all, "(sleep)") != 1:
			return fmt.Errorf("not one process is left, but:\n%s", all)
		}
		return nil
	}))
	noError(t, b.Kill())
	noError(t, lab.WaitFor(ctx, "the end of the box's processes", 20*time.Second, func() error {
		if p.Alive() == nil {
			return errors.New("one is left")
		}
		return nil
	}))
}
