package fdstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// StandbyEnv has the number of a socket (SOCK_SEQPACKET) in the environment of a standby:
// a process that `shoal keep` starts while the process before it still runs. The standby
// sends one byte when it waits, and the answer is the message of GoOn. Descriptors come
// with that message and not before: until it is its turn, a standby cannot change what the
// other process uses, even if it is a version that does not know of this.
const StandbyEnv = "SHOAL_STANDBY"

const (
	goOn        = "go on" // the message begins with it; the names follow, each after a colon
	maxMessage  = 64 << 10
	maxMessaged = 253 // descriptors, the kernel's SCM_MAX_FD
)

// turnSocket is the standby's end of the socket. Its children do not inherit it.
func turnSocket(number string) (*os.File, error) {
	fd, err := strconv.Atoi(number)
	if err != nil {
		return nil, fmt.Errorf("environment variable %s: %w", StandbyEnv, err)
	}
	if err := errors.Join(os.Unsetenv(StandbyEnv), unix.SetNonblock(fd, true)); err != nil {
		return nil, fmt.Errorf("descriptor %d of %s: %w", fd, StandbyEnv, err)
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "turn"), nil
}

// await waits for the turn of this process, and returns what comes with it, by name.
func await(ctx context.Context, turn *os.File) (map[string]*os.File, error) {
	stop := context.AfterFunc(ctx, func() { _ = turn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := turn.Write([]byte{1})
	var files map[string]*os.File
	if err == nil {
		files, err = receive(turn)
	}
	switch {
	case err == nil:
		return files, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	default:
		return nil, fmt.Errorf("wait for the end of the process before this one: %w", err)
	}
}

// receive waits for the message of GoOn.
func receive(turn *os.File) (map[string]*os.File, error) {
	conn, err := turn.SyscallConn()
	if err != nil {
		return nil, err
	}
	text, control := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxMessaged))
	var n, nc, flags int
	var rerr error
	err = conn.Read(func(fd uintptr) bool {
		n, nc, flags, _, rerr = unix.Recvmsg(int(fd), text, control, unix.MSG_CMSG_CLOEXEC)
		return !errors.Is(rerr, unix.EAGAIN)
	})
	if err := errors.Join(err, rerr); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, errors.New("shoal keep does not need this process any more")
	}
	messages, err := unix.ParseSocketControlMessage(control[:nc])
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, m := range messages {
		more, _ := unix.ParseUnixRights(&m) // an error: it is no such message
		fds = append(fds, more...)
	}
	names := strings.Split(string(text[:n]), ":")
	if names[0] != goOn || len(names) != 1+len(fds) || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, fmt.Errorf("%d descriptors came for %d names; the limit of open files may be too low", len(fds), len(names)-1)
	}
	files := make(map[string]*os.File, len(fds))
	for i, fd := range fds {
		name := names[1+i]
		if _, twice := files[name]; twice {
			_ = unix.Close(fd) // never by this program
			continue
		}
		if err := unix.SetNonblock(fd, false); err != nil { // as plain does
			return nil, err
		}
		files[name] = os.NewFile(uintptr(fd), name)
	}
	return files, nil
}

// GoOn is keep's side: it says on the other end of the socket that it is the standby's
// turn, and gives it these files, each under the name with the same index. It fails if
// the standby has ended.
func GoOn(turn *os.File, names []string, files []*os.File) error {
	text := strings.Join(append([]string{goOn}, names...), ":")
	if len(text) > maxMessage {
		return fmt.Errorf("the names of %d descriptors are too long", len(names))
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	conn, err := turn.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = conn.Control(func(fd uintptr) { serr = unix.Sendmsg(int(fd), []byte(text), rights, nil, unix.MSG_NOSIGNAL) })
	return errors.Join(err, serr)
}
