// Package fdstore is a daemon's side of sd_notify(3): descriptors that outlive the
// process, and telling the program that started it how it is. On the other side is
// systemd (FileDescriptorStoreMax=), or `shoal keep`; or nobody, and then nothing
// of this does anything.
//
// Descriptors come back at the next start as LISTEN_FDS and LISTEN_FDNAMES say, or
// to a standby of `shoal keep` on a socket, when it is its turn (turn.go). Files that were
// kept are not closed when this process, or any number of it, dies.
package fdstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// barrierTimeout is how long the other side may take to do what it was told.
const barrierTimeout = 5 * time.Second

// ErrNoStore: the program that started this process stores no descriptors.
var ErrNoStore = errors.New("no descriptor store holds descriptors for this process")

// Store is the descriptor store of this process.
type Store struct {
	socket string // "" if there is nobody

	mu    sync.Mutex
	files map[string]*os.File // what came and has not been taken
}

// Open takes over what was kept, and takes the variables that say so out of the
// environment. A process that `shoal keep` has started while the one before it still
// runs waits here until that one has ended; so Open is to be called once, before
// anything that the other process may use. It fails if keep ends or does not want this
// process any more, and with ctx's error.
func Open(ctx context.Context) (*Store, error) {
	s := &Store{socket: os.Getenv("NOTIFY_SOCKET"), files: make(map[string]*os.File)}
	if number := os.Getenv(StandbyEnv); number != "" {
		turn, err := turnSocket(number)
		if err != nil {
			return nil, err
		}
		defer turn.Close()
		s.files, err = await(ctx, turn)
		return s, err
	}
	for _, f := range activation.Files(true) {
		name := f.Name()
		if _, twice := s.files[name]; twice {
			_ = f.Close() // never by this program
			continue
		}
		if g, err := plain(f, name); err == nil {
			s.files[name] = g
		}
	}
	return s, nil
}

// plain makes a file of a copy of f, which it closes. The new one is blocking, so
// that Go does not watch it: a /dev/fuse that was watched would wake the
// scheduler for each request.
func plain(f *os.File, name string) (*os.File, error) {
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var derr error
	err = conn.Control(func(old uintptr) {
		if fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); derr == nil {
			derr = unix.SetNonblock(fd, false)
		}
	})
	if err = errors.Join(err, derr); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Kept says whether there is a program that stores descriptors. Before version 254,
// systemd does not say whether it does; it is believed to.
func (s *Store) Kept() bool {
	if s.socket == "" {
		return false
	}
	most, set := os.LookupEnv("FDSTORE")
	if n, err := strconv.Atoi(most); set && (err != nil || n == 0) {
		return false
	}
	return true
}

// Take returns what was kept under name when this process started, once; nil if
// there is nothing. The caller closes it; it goes on being kept.
func (s *Store) Take(name string) *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[name]
	delete(s.files, name)
	return f
}

// Keep has f, and nothing else, kept under name: ASCII without ":". When it
// returns the other side has it, and has dropped what was there. It fails with
// ErrNoStore if there is no other side.
func (s *Store) Keep(name string, f *os.File) error {
	if !s.Kept() {
		return ErrNoStore
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	state := "FDSTORE=1\nFDNAME=" + name
	if info.Mode().Type() != fs.ModeSocket {
		// systemd polls what it stores, to drop what is dead. A /dev/fuse would wake it for
		// each request, where a listener wakes it for none; and the next process finds out
		// whether a connection is dead, but not whether a listener is. Before version 246,
		// systemd polls all.
		state += "\nFDPOLL=0"
	}
	if err := s.send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
		return err
	}
	var serr error
	err = conn.Control(func(fd uintptr) { serr = s.send(state, int(fd)) })
	if err := errors.Join(err, serr); err != nil {
		return err
	}
	// What was there is not left over any more.
	if old := s.Take(name); old != nil {
		_ = old.Close() // nothing was written
	}
	return s.barrier()
}

// Drop has nothing kept under name any more.
func (s *Store) Drop(name string) error {
	if !s.Kept() {
		return nil
	}
	if err := s.send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
		return err
	}
	return s.barrier()
}

// DropRest drops what was stored when this process started and was not taken. It
// belongs to a version that keeps more than this one; a socket of which there is
// a copy that no process answers would make its callers wait for ever.
func (s *Store) DropRest() error {
	s.mu.Lock()
	rest := s.files
	s.files = make(map[string]*os.File)
	s.mu.Unlock()
	var errs []error
	for name, f := range rest {
		errs = append(errs, f.Close(), s.Drop(name))
	}
	return errors.Join(errs...)
}

// send sends one message, with descriptors.
func (s *Store) send(state string, fds ...int) error {
	// net.UnixConn sends no descriptors on a connected datagram socket.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("descriptor store: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: s.socket}, unix.MSG_NOSIGNAL)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("descriptor store %s: %w", s.socket, err)
		}
	}
}

// barrier returns when all messages before have been dealt with: the other side
// closes the descriptor that comes with this one when it is its turn.
func (s *Store) barrier() error {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	defer func() { _ = unix.Close(p[0]) }()
	err := s.send("BARRIER=1", p[1])
	_ = unix.Close(p[1])
	if err != nil {
		return err
	}
	fds := [1]unix.PollFd{{Fd: int32(p[0])}}
	deadline := time.Now().Add(barrierTimeout)
	for {
		n, err := unix.Poll(fds[:], int(max(0, time.Until(deadline).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("descriptor store: no answer within %v", barrierTimeout)
		default:
			return nil
		}
	}
}

// Ready says that the daemon does its work.
func (s *Store) Ready() error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyReady)
	return err
}

// Stopping says that the daemon is about to end because it was told to.
func (s *Store) Stopping() error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyStopping)
	return err
}

// Watch calls alive as often as the other side wants to hear that this process
// is alive (WatchdogSec=), until ctx ends, and says so each time alive returns nil.
// It returns at once if the other side does not want that.
func (s *Store) Watch(ctx context.Context, alive func(context.Context) error) error {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return err
	}
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	for {
		if alive(ctx) == nil {
			if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err != nil {
				return err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}
