// Package keep is what systemd does for a daemon that it restarts, where there is
// no systemd: it holds the descriptors that the daemon must not lose, and starts
// the daemon again whenever it ends.
//
// Towards the daemon it speaks sd_notify(3): FDSTORE=1 and FDSTOREREMOVE=1 with
// FDNAME=, BARRIER=1, READY=1; and LISTEN_FDS, LISTEN_FDNAMES and LISTEN_PID at its
// start. Everything else that systemd understands is ignored.
//
// # Invariants
//
//   - What the daemon has sent before it ended is in the store before it is
//     started again.
//   - The program is held open, so what is started again is what ran before,
//     whatever has become of the file. Only Upgrade takes the file again; and if
//     what is there does not get ready, the program before is started again.
//   - While a new program loads (standby.go), the old one serves. The new one goes on
//     when the old one has ended, and not before; and until then it has none of what is
//     in the store.
//   - The daemon outlives a keeper that is killed. But then no program
//     starts it again.
package keep

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
	"github.com/shoalfs/shoal/internal/program"
)

// Upgrade is the signal that replaces the running program by what its file is now.
const Upgrade = syscall.SIGUSR2

const (
	maxStored = 64
	// Pauses before a daemon is started again that did not get ready, but for the
	// first time; or that ended within steady of being ready, but for the first
	// freeRestarts times: a request that kills it comes again to the next one. One that
	// was ready for longer is started at once. Each pause is twice as long as the one before.
	firstPause, maxPause = 100 * time.Millisecond, 5 * time.Second
	freeRestarts         = 5
	steady               = 500 * time.Millisecond
)

// Config of Run.
type Config struct {
	// Command is the daemon: a program, found in PATH if it has no slash, and its
	// arguments.
	Command []string
	// Launcher is a command that ends up in Launch with the arguments added to it.
	Launcher []string
	// StartTimeout is how long a new version may take to get ready.
	StartTimeout time.Duration
	// StopTimeout is how long the daemon may take to end before it is killed.
	StopTimeout time.Duration
	Log         *slog.Logger
}

// Signals are those that Run wants to get.
func Signals() []os.Signal {
	return []os.Signal{Upgrade, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1}
}

// Run runs the daemon until a SIGTERM or SIGINT comes, which the daemon gets as
// well, and returns how it ended. Other signals are passed on, but for Upgrade.
func Run(cfg Config, signals <-chan os.Signal) error {
	path, err := exec.LookPath(cfg.Command[0])
	if err != nil {
		return err
	}
	k := &keeper{Config: cfg, path: path, ready: make(chan struct{}, 1)}
	if k.program, err = program.Open(path); err != nil {
		return err
	}
	if k.socket, k.address, err = listen(); err != nil {
		return fmt.Errorf("notification socket: %w", err)
	}
	go k.receive()
	return k.loop(signals)
}

type keeper struct {
	Config
	path    string
	address string // of the notification socket
	socket  int

	program  *os.File // that runs, or is to run
	previous *os.File // that ran before an upgrade which is not over yet
	next     *os.File // that an upgrade waits to start
	standby  *standby // of next; nil: next is started when the child has ended

	child    *exec.Cmd // nil between two lives
	ended    <-chan error
	ready    chan struct{}
	wasReady bool      // the child has said so
	since    time.Time // when it said so
	failures int       // children in a row that were not ready for as long as steady
	pauses   int       // before those of them that had to wait
	stopping bool

	mu     sync.Mutex
	pid    int // whose messages count
	stored []stored
}

type stored struct {
	name string
	file *os.File
}

// loop is the life of a keeper: everything but the store happens here.
func (k *keeper) loop(signals <-chan os.Signal) error {
	defer k.dropStandby()
	if err := k.start(); err != nil {
		return err
	}
	var deadline <-chan time.Time // for the child to get ready, or to end
	var pause <-chan time.Time    // before it is started again
	for {
		select {
		case <-k.ready:
			k.isReady()
			if k.previous != nil {
				k.Log.Info("upgraded", "program", k.path)
				k.previous.Close()
				k.previous = nil
				if !k.stopping { // else it is the stop's
					deadline = nil
				}
			}
		case s := <-signals:
			switch {
			case s == Upgrade:
				if k.child != nil && k.upgrade() && k.standby == nil {
					deadline = k.makeRoom()
				}
				continue
			case s == syscall.SIGTERM || s == syscall.SIGINT:
				k.dropStandby()
				if k.stopping = true; k.child == nil {
					return nil
				}
				deadline = time.After(k.StopTimeout)
			case k.child == nil:
				continue
			}
			_ = k.child.Process.Signal(s) // it may just have ended
		case waits := <-k.standby.answer():
			if !waits {
				k.Log.Info("the new program does not wait for the old one to end; it is started after that", "program", k.path)
				k.dropStandby()
			} else {
				k.standby.ready = true
			}
			if k.child != nil { // else its end has come first, and the next one is about to start
				deadline = k.makeRoom()
			}
		case <-deadline:
			k.Log.Error("the program did not end in time and is killed", "program", k.path)
			_ = k.child.Process.Kill()
		case err := <-k.ended:
			k.child, deadline = nil, nil
			if k.standby != nil && !k.standby.ready {
				// It may be a program that does not wait, and takes the files that the child
				// had locked.
				k.dropStandby()
			}
			k.drain()
			if k.stopping {
				return err
			}
			pause = time.After(k.after(err))
		case <-pause:
			pause = nil
			if err := k.start(); err != nil {
				k.Log.Error("cannot start the program; trying again", "program", k.path, "error", err)
				pause = time.After(k.after(err))
			} else if k.previous != nil {
				deadline = time.After(k.StartTimeout)
			}
		}
	}
}

// upgrade opens what the program's file is now, and starts a standby of it if the child
// is ready: one that is not may not have locked its files yet, and a program that does not
// wait for its turn would take them.
func (k *keeper) upgrade() bool {
	if k.next != nil || k.previous != nil || k.stopping {
		k.Log.Warn("an upgrade or a stop is under way; this request to upgrade is ignored")
		return false
	}
	next, err := program.Open(k.path)
	if err != nil {
		k.Log.Error("no upgrade: cannot open the new program; the old one goes on", "error", err)
		return false
	}
	// It is brought into memory while the old one still answers. If it cannot be read,
	// it will not get ready either.
	_, _ = io.Copy(io.Discard, io.NewSectionReader(next, 0, math.MaxInt64))
	k.next = next
	select {
	case <-k.ready: // it may have come together with the signal
		k.isReady()
	default:
	}
	if k.wasReady {
		if err := k.startAhead(); err != nil {
			k.Log.Warn("cannot start the new program while the old one runs; it is started after that", "program", k.path, "error", err)
		}
	}
	return true
}

// isReady notes that the child has said so.
func (k *keeper) isReady() {
	if !k.wasReady {
		k.wasReady, k.since = true, time.Now()
	}
}

// makeRoom ends the child. It returns when the child is late.
func (k *keeper) makeRoom() (deadline <-chan time.Time) {
	_ = k.child.Process.Signal(syscall.SIGTERM) // it may just have ended
	return time.After(k.StopTimeout)
}

// after chooses what is started after the child has ended, and says when.
func (k *keeper) after(err error) time.Duration {
	switch {
	case k.next != nil:
		k.previous, k.program, k.next = k.program, k.next, nil
		return 0
	case k.previous != nil:
		k.Log.Error("the upgrade failed: the new program did not get ready; the old one is started again", "program", k.path, "end", ending(err))
		k.program.Close()
		k.program, k.previous = k.previous, nil
		return 0
	}
	free := 1
	if k.wasReady {
		free = freeRestarts
		if time.Since(k.since) >= steady {
			k.failures, k.pauses = 0, 0
		}
	}
	wait := time.Duration(0)
	if k.failures >= free {
		wait = min(firstPause<<min(k.pauses, 10), maxPause)
		k.pauses++
	}
	k.failures++
	k.Log.Warn("the program ended; starting it again", "program", k.path, "end", ending(err), "in", wait)
	return wait
}

func ending(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// start starts the program, or has its standby go on.
func (k *keeper) start() (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.wasReady = false
	if s := k.takeStandby(); s != nil {
		k.child, k.ended = s.cmd, s.ended
	} else if k.child, k.ended, err = k.spawn(k.program, nil); err != nil {
		return err
	}
	k.pid = k.child.Process.Pid
	select {
	case <-k.ready: // of an earlier child
	default:
	}
	return nil
}

// spawn starts a program with all that is stored; mu is held. It goes through Launch,
// since LISTEN_PID cannot be known here. If turn is not nil, then it is a standby's end of
// its socket, and the standby gets nothing else.
func (k *keeper) spawn(next, turn *os.File) (*exec.Cmd, <-chan error, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	c := exec.Command("/proc/self/exe")
	c.Args = slices.Concat([]string{self}, k.Launcher, []string{program.Path(next)}, k.Command)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "LISTEN_") || strings.HasPrefix(v, "WATCHDOG_") || strings.HasPrefix(v, fdstore.StandbyEnv+"=")
	})
	c.Env = append(c.Env, "NOTIFY_SOCKET="+k.address, "FDSTORE="+strconv.Itoa(maxStored))
	const first = 3 // the descriptor that the first of ExtraFiles becomes
	if turn != nil {
		c.ExtraFiles = []*os.File{turn}
		c.Env = append(c.Env, fdstore.StandbyEnv+"="+strconv.Itoa(first))
	} else if names, files := k.all(); len(names) > 0 {
		c.ExtraFiles = files
		c.Env = append(c.Env, "LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	}
	if err := c.Start(); err != nil {
		return nil, nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	return c, ended, nil
}

// all returns what is stored; mu is held.
func (k *keeper) all() (names []string, files []*os.File) {
	for _, s := range k.stored {
		names, files = append(names, s.name), append(files, s.file)
	}
	return names, files
}

// Launch is the last thing that a process does which Run has started by
// Config.Launcher: it becomes args[1:], the program at the path args[0].
// It does not if ctx, which a signal to end cancels, has ended.
func Launch(ctx context.Context, args []string) error {
	if len(args) < 2 {
		return errors.New("do not call this command by hand")
	}
	// From here on such a signal ends the process.
	signal.Reset(syscall.SIGTERM, syscall.SIGINT)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if os.Getenv("LISTEN_FDS") != "" {
		if err := os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())); err != nil {
			return err
		}
	}
	return fmt.Errorf("start %s: %w", args[1], unix.Exec(args[0], args[1:], os.Environ()))
}

// listen makes the notification socket, with a name that the kernel chooses.
func listen() (fd int, address string, err error) {
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, "", err
	}
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1), unix.Bind(fd, &unix.SockaddrUnix{})); err != nil {
		return 0, "", err
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return 0, "", err
	}
	return fd, name.(*unix.SockaddrUnix).Name, nil
}

// receive handles messages as they come.
func (k *keeper) receive() {
	for {
		fds := []unix.PollFd{{Fd: int32(k.socket), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			k.Log.Error("cannot wait for messages on the notification socket", "error", err)
			return
		}
		k.drain()
	}
}

// drain handles all messages that have come.
func (k *keeper) drain() {
	k.mu.Lock()
	defer k.mu.Unlock()
	text := make([]byte, 4096)
	control := make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*maxStored))
	for {
		n, nc, _, _, err := unix.Recvmsg(k.socket, text, control, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return // nothing left
		}
		messages, err := unix.ParseSocketControlMessage(control[:nc])
		if err != nil {
			k.Log.Error("cannot read a message from the daemon", "error", err)
			continue
		}
		var files []*os.File
		pid := 0
		for _, m := range messages {
			if cred, err := unix.ParseUnixCredentials(&m); err == nil {
				pid = int(cred.Pid)
			}
			fds, _ := unix.ParseUnixRights(&m) // an error: it is no such message
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), "kept"))
			}
		}
		if pid == k.pid {
			files = k.handle(strings.Split(string(text[:n]), "\n"), files)
		}
		for _, f := range files { // for BARRIER=1 this is the answer
			f.Close()
		}
	}
}

// handle does what a message says, and returns the files that were not stored.
func (k *keeper) handle(lines []string, files []*os.File) []*os.File {
	name := "stored"
	for _, l := range lines {
		if n, ok := strings.CutPrefix(l, "FDNAME="); ok && n != "" && !strings.Contains(n, ":") {
			name = n
		}
	}
	for _, l := range lines {
		switch l {
		case "READY=1":
			select {
			case k.ready <- struct{}{}:
			default:
			}
		case "FDSTORE=1":
			if len(k.stored)+len(files) > maxStored {
				k.Log.Error("too many descriptors; the new ones are not stored", "name", name)
				continue
			}
			for _, f := range files {
				k.stored = append(k.stored, stored{name, f})
			}
			files = nil
		case "FDSTOREREMOVE=1":
			k.stored = slices.DeleteFunc(k.stored, func(s stored) bool {
				if s.name == name {
					s.file.Close()
				}
				return s.name == name
			})
		}
	}
	return files
}
