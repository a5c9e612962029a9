package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Disk is an ext4 file system of its own, in a file, that can lose its power.
type Disk struct {
	// Dir is where it is mounted.
	Dir string

	lab   *Lab
	image string
}

// NewDisk mounts a new disk of so many bytes at Dir/name, for a node or supernode
// of that name.
func (l *Lab) NewDisk(ctx context.Context, name string, size int64) (*Disk, error) {
	d := &Disk{Dir: l.Path(name), lab: l, image: l.Path(name + ".ext4")}
	f, err := os.Create(d.image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(size), f.Close(), os.MkdirAll(d.Dir, 0o700)); err != nil {
		return nil, err
	}
	if _, err := l.Run(ctx, "mkfs.ext4", "-q", "-F", d.image); err != nil {
		return nil, err
	}
	if err := d.mount(ctx); err != nil {
		return nil, err
	}
	l.OnClose(func() error { return d.unmount(context.Background()) })
	return d, nil
}

func (d *Disk) mount(ctx context.Context) error {
	_, err := d.lab.Run(ctx, "mount", "-o", "loop", d.image, d.Dir)
	return err
}

// Cut takes the power away: what was written and not synced is lost at once, and
// nothing can be written any more. Whoever uses the disk is killed after, and then
// Restore is called.
func (d *Disk) Cut() error {
	f, err := os.Open(d.Dir)
	if err != nil {
		return err
	}
	defer f.Close()
	const (
		shutdown   = 0x8004587d // EXT4_IOC_SHUTDOWN
		noLogFlush = 2          // EXT4_GOING_FLAGS_NOLOGFLUSH
	)
	if err := unix.IoctlSetPointerInt(int(f.Fd()), shutdown, noLogFlush); err != nil {
		return fmt.Errorf("shut down %s: %w", d.Dir, err)
	}
	return nil
}

// Restore gives the power back. What was mounted on the disk is gone, as after a
// boot.
func (d *Disk) Restore(ctx context.Context) error {
	if err := d.unmount(ctx); err != nil {
		return err
	}
	return d.mount(ctx)
}

// unmount takes all mounts below away first. What has just been killed may hold
// files for a moment longer.
func (d *Disk) unmount(ctx context.Context) error {
	return WaitFor(ctx, "unmount of "+d.Dir, 20*time.Second, func() error {
		infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(d.Dir))
		if err != nil {
			return err
		}
		for _, i := range slices.Backward(infos) {
			if i.Mountpoint != d.Dir && !isBelow(i.Mountpoint, d.Dir) {
				continue
			}
			if err := unix.Unmount(i.Mountpoint, 0); err != nil {
				return fmt.Errorf("unmount %s: %w", i.Mountpoint, err)
			}
		}
		return nil
	})
}

func isBelow(path, dir string) bool {
	return len(path) > len(dir) && path[:len(dir)] == dir && path[len(dir)] == '/'
}

// DetachAll takes everything that is mounted at dir or below out of the tree.
func DetachAll(dir string) error {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	for _, i := range slices.Backward(infos) {
		if err := unix.Unmount(i.Mountpoint, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("detach %s: %w", i.Mountpoint, err)
		}
	}
	return nil
}
