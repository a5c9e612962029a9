package node

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"

	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
	"github.com/shoalfs/shoal/internal/control"
)

// Names of a node's sockets in the descriptor store.
const (
	keptContainerd = "containerd"
	keptControl    = "control"
	keptMirror     = "mirror"
)

// socket is where to listen.
type socket struct {
	listen func() (net.Listener, error)
	// is says why a listener that was kept is not this one.
	is func(net.Listener) error
}

// unixSocket is a Unix socket that only root may open.
func unixSocket(path string) socket {
	return socket{
		listen: func() (net.Listener, error) { return control.Listen(path) },
		is: func(ln net.Listener) error {
			if at := ln.Addr().String(); ln.Addr().Network() != "unix" || at != path {
				return fmt.Errorf("its address is %s, and the config says %s", at, path)
			}
			if fi, err := os.Lstat(path); err != nil || fi.Mode().Type() != fs.ModeSocket {
				return fmt.Errorf("%s is not there any more", path)
			}
			return nil
		},
	}
}

// tcpSocket is a port.
func tcpSocket(addr string) socket {
	return socket{
		listen: daemon.TCP(addr),
		is: func(ln net.Listener) error {
			at, ok := ln.Addr().(*net.TCPAddr)
			want, err := net.ResolveTCPAddr("tcp", addr)
			if err != nil {
				return err
			}
			all := want.IP == nil || want.IP.IsUnspecified()
			if !ok || want.Port != 0 && at.Port != want.Port || all != at.IP.IsUnspecified() || !all && !at.IP.Equal(want.IP) {
				return fmt.Errorf("its address is %v, and the config says %s", ln.Addr(), addr)
			}
			return nil
		},
	}
}

// listenKept returns a socket, with what has come to it while no process was
// there, and has it kept under name for the next one.
func listenKept(store *fdstore.Store, name string, s socket, log *slog.Logger) (net.Listener, error) {
	if f := store.Take(name); f != nil {
		ln, err := adopt(f, s)
		if err == nil {
			return ln, nil
		}
		log.Warn("cannot take over a stored socket; a new one is made", "socket", name, "error", err)
		// A client that still connects to the old one must not wait for ever.
		if err := store.Drop(name); err != nil {
			return nil, err
		}
	}
	ln, err := s.listen()
	if err != nil || !store.Kept() {
		return ln, err
	}
	file, ok := ln.(interface{ File() (*os.File, error) })
	if !ok {
		return ln, nil
	}
	f, err := file.File()
	if err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	defer f.Close()
	if err := store.Keep(name, f); err != nil {
		log.Error("cannot store a socket: if this process ends, calls fail until the next process runs", "socket", name, "error", err)
		return ln, nil
	}
	stays(ln)
	return ln, nil
}

// stays has the path of a Unix socket stay when the listener is closed.
func stays(ln net.Listener) {
	if unix, ok := ln.(*net.UnixListener); ok {
		unix.SetUnlinkOnClose(false)
	}
}

// adopt makes a listener of f, which it closes.
func adopt(f *os.File, s socket) (net.Listener, error) {
	defer f.Close()
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	stays(ln)
	if err := s.is(ln); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}
