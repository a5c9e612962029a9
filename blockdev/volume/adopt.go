package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/fusefs"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// Keeper holds descriptors for longer than a process lives, as systemd's
// descriptor store does.
type Keeper interface {
	// Take returns what an earlier process had kept under name, nil if nothing.
	// The caller closes it; it goes on being kept.
	Take(name string) *os.File
	// Keep has f kept under name, and nothing else. It returns when that is so, as
	// far as can be known.
	Keep(name string, f *os.File) error
	// Drop has nothing kept under name any more.
	Drop(name string) error
}

// What a Manager has kept. Names and formats outlive versions of this program.
const (
	// keptFUSE is the /dev/fuse descriptor. It is kept last, so where it is, the
	// others are, too.
	keptFUSE = "fuse"
	// keptPending is a memfd with the requests that are being worked on. Versions
	// before this one had none.
	keptPending = "fuse-pending"
	// keptInit is a memfd with a record of the connection (encodeConnection).
	keptInit = "fuse-init"
)

// keptConnection is what serve begins with: a FUSE connection that an earlier process has
// mounted, or this one just now.
type keptConnection struct {
	fd      *os.File
	init    []byte   // fusefs.Options.Init
	pending *os.File // fusefs.Options.Pending; nil: requests are not noted
}

// The record of a connection: what follows the magic is little-endian.
//
//	 0   8  magic "SHOALFU" and a version byte, 1
//	 8   4  major device number of the FUSE mount
//	12   4  minor
//	16      fusefs.Server.Init: FUSE_INIT request and answer, each with its length
//	        in the first 4 bytes, in host byte order
const (
	recordMagic  = "SHOALFU\x01"
	recordHeader = 16
	recordMost   = 64 << 10
)

func encodeConnection(i mount.Info, init []byte) []byte {
	b := append(make([]byte, 0, recordHeader+len(init)), recordMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(i.Major))
	b = binary.LittleEndian.AppendUint32(b, uint32(i.Minor))
	return append(b, init...)
}

func decodeConnection(b []byte) (major, minor int, init []byte, err error) {
	if len(b) <= recordHeader || len(b) > recordMost || string(b[:len(recordMagic)]) != recordMagic {
		return 0, 0, nil, fmt.Errorf("record of the FUSE connection: %w", blockdev.ErrCorrupt)
	}
	major, minor, init = int(binary.LittleEndian.Uint32(b[8:])), int(binary.LittleEndian.Uint32(b[12:])), b[recordHeader:]
	return major, minor, init, fusefs.CheckInit(init)
}

// adopt returns the connection of an earlier process, if it was kept
// and is what is mounted; else nil, and the log says why if that is not as usual.
func (c *connection) adopt(left []mount.Info) *keptConnection {
	if c.cfg.Keep == nil {
		return nil
	}
	fd := c.cfg.Keep.Take(keptFUSE)
	if fd == nil {
		return nil
	}
	init, err := c.checkKept(fd, left)
	if err != nil {
		c.cfg.Log.Warn("cannot take over the stored FUSE connection; a new one is made", "error", err)
		_ = fd.Close() // nothing was written
		return nil
	}
	c.widen(init, left)
	return &keptConnection{fd, init, c.adoptPending()}
}

// widen gives an adopted connection the limits of this version.
func (c *connection) widen(init []byte, left []mount.Info) {
	top, _ := fuseMount(c.root, left)
	if err := fusefs.Widen(init, uint32(top.Minor)); err != nil {
		c.cfg.Log.Warn("the FUSE connection was opened by an earlier version and keeps its limits: if many reads wait for bytes, then all other reads wait, too; a restart of this machine ends this",
			"error", err)
	}
}

// adoptPending returns the table of requests that the earlier process has worked
// on, or keeps a new one.
func (c *connection) adoptPending() *os.File {
	f := c.cfg.Keep.Take(keptPending)
	if f != nil {
		err := fusefs.CheckPending(f)
		if err == nil {
			return f
		}
		c.cfg.Log.Warn("cannot read the record of pending requests that the last process left; a new record is begun", "error", err)
		_ = f.Close() // nothing was written
	}
	f, err := c.keepPending()
	if err != nil {
		c.cfg.Log.Error("cannot record pending requests: if this process ends, a kernel before Linux 6.9 forgets them", "error", err)
	}
	return f
}

// keepPending makes a table of requests and has it kept.
func (c *connection) keepPending() (*os.File, error) {
	f, err := fusefs.NewPending()
	if err != nil {
		return nil, err
	}
	if err := c.cfg.Keep.Keep(keptPending, f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (c *connection) checkKept(fd *os.File, left []mount.Info) (init []byte, err error) {
	record := c.cfg.Keep.Take(keptInit)
	if record == nil {
		return nil, errors.New("its record was not stored")
	}
	defer record.Close()
	b, err := io.ReadAll(io.NewSectionReader(record, 0, recordMost+1))
	if err != nil {
		return nil, err
	}
	major, minor, init, err := decodeConnection(b)
	if err != nil {
		return nil, err
	}
	if !fusefs.Alive(fd) {
		return nil, errors.New("it was aborted, or its mount is gone")
	}
	top, ok := fuseMount(c.root, left)
	if !ok || top.Major != major || top.Minor != minor {
		return nil, fmt.Errorf("it is not what is mounted at %s", filepath.Join(c.root, fuseDir))
	}
	return init, nil
}

// fuseMount finds the FUSE mount that is seen, which is the last one.
func fuseMount(root string, mounts []mount.Info) (top mount.Info, ok bool) {
	for _, i := range mounts {
		if i.Type == fusefs.FSType && i.Dir == filepath.Join(root, fuseDir) {
			top, ok = i, true
		}
	}
	return top, ok
}

// resume has answered what the last process has not.
func (c *connection) resume() error {
	switch err := c.server.Resume(); {
	case errors.Is(err, blockdev.ErrUnsupported):
		c.cfg.Log.Warn("reads that were under way when the last process ended get no answer; restart the containers that hang", "error", err)
	case err != nil:
		return err
	}
	c.cfg.Log.Info("lazy mounts of the last process taken over")
	return nil
}

// initTimeout bounds the wait for the kernel's first request, which is under way
// when mount(2) returns.
const initTimeout = 10 * time.Second

// keep has a new connection kept, before anything is mounted over it.
// Without it all works, until this process ends.
func (c *connection) keep(ctx context.Context) {
	if c.cfg.Keep == nil {
		return
	}
	if err := c.tryKeep(ctx); err != nil {
		c.cfg.Log.Error("cannot store the FUSE descriptor: if this process ends, containers on lazy mounts get I/O errors", "error", err)
	}
}

func (c *connection) tryKeep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, initTimeout)
	defer cancel()
	init, err := c.server.Init(ctx)
	if err != nil {
		return err
	}
	mounts, err := leftMounts(c.root)
	if err != nil {
		return err
	}
	i, ok := fuseMount(c.root, mounts)
	if !ok {
		return fmt.Errorf("%s is not mounted any more", filepath.Join(c.root, fuseDir))
	}
	fd, err := unix.MemfdCreate("shoal-fuse-init", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memfd: %w", err)
	}
	record := os.NewFile(uintptr(fd), keptInit)
	defer record.Close()
	if _, err := record.Write(encodeConnection(i, init)); err != nil {
		return err
	}
	if err := c.cfg.Keep.Keep(keptInit, record); err != nil {
		return err
	}
	return c.cfg.Keep.Keep(keptFUSE, c.fuse)
}
