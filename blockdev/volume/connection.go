package volume

import (
	"context"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/fusefs"
)

// connection is the FUSE mount at a Manager's root, and what answers it. Its descriptor
// is kept by Config.Keep, if there is one, before anything is mounted over the FUSE mount.
type connection struct {
	cfg      Config
	root     string
	describe func(blockdev.Digest) []any

	// What follows is set by serve, once.
	fuse   *os.File
	server *fusefs.Server
	stop   context.CancelFunc
	done   chan struct{}
}

func newConnection(cfg Config, root string, describe func(blockdev.Digest) []any) *connection {
	return &connection{cfg: cfg, root: root, describe: describe}
}

// serve answers an adopted connection, or mounts FUSE and answers that.
func (c *connection) serve(ctx context.Context, shown files, kept *keptConnection) (err error) {
	adopted := kept != nil
	if !adopted {
		fd, err := fusefs.Mount(filepath.Join(c.root, fuseDir))
		if err != nil {
			return err
		}
		kept = &keptConnection{fd: fd}
		if c.cfg.Keep != nil {
			// Kept before the descriptor is. Where it cannot be, that cannot be, too, and
			// keep says so.
			kept.pending, _ = c.keepPending()
		}
	}
	if kept.pending != nil {
		defer func() { _ = kept.pending.Close() }() // mapped, and kept
	}
	c.fuse = kept.fd
	c.server, err = fusefs.New(kept.fd, shown, fusefs.Options{
		Log: c.cfg.Log, ReadTimeout: c.cfg.ReadTimeout, Describe: c.describe, Observe: c.cfg.Observe, Failed: c.cfg.ReadFailed, Init: kept.init, Pending: kept.pending,
	})
	if err != nil {
		return err
	}
	life, stop := context.WithCancel(context.Background())
	c.stop, c.done = stop, make(chan struct{})
	go func() {
		defer close(c.done)
		if err := c.server.Serve(life); err != nil {
			c.cfg.Log.Error("the FUSE server ended: lazy images cannot be read; restart the node", "error", err)
		} else if life.Err() == nil {
			c.cfg.Log.Error("the FUSE mount is gone: lazy images cannot be read; restart the node")
		}
	}()
	if adopted {
		return c.resume()
	}
	c.keep(ctx)
	return nil
}

// check asks the FUSE mount something, and returns when it has been answered.
func (c *connection) check(ctx context.Context) error {
	done := make(chan error, 1)
	go func() {
		var st unix.Statfs_t
		done <- unix.Statfs(filepath.Join(c.root, fuseDir), &st)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close ends what serve has begun, and gives the descriptor back. The FUSE mount stays,
// and so does the connection while the descriptor is kept.
func (c *connection) close() error {
	if c.stop != nil {
		c.stop()
		<-c.done
	}
	if c.fuse == nil {
		return nil
	}
	return c.fuse.Close()
}
