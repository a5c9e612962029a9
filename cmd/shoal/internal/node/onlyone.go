package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// collectors are programs that remove all snapshots that they have not made.
var collectors = []string{"containerd", "buildkitd"}

// onlyOne lets one collector at a time use the snapshotter: two would delete each
// other's snapshots, of running containers as well, since each takes what the
// other has made for garbage. Which process is the one is decided by the first
// connection, and stands until that process has ended. Programs of other names
// are let through.
type onlyOne struct {
	log *slog.Logger
	// look says what program a process runs, and when it was started; an error if
	// there is no such process.
	look func(pid int32) (process, error)

	mu     sync.Mutex
	pid    int32 // 0: nobody yet
	owner  process
	warned map[int32]process
}

// process is a program that runs.
type process struct {
	program string // the base name of its file
	started string // tells it from others that had the same pid
}

func newOnlyOne(log *slog.Logger) *onlyOne {
	return &onlyOne{log: log, look: lookAt, warned: make(map[int32]process)}
}

// options are for the server of the snapshotter.
func (o *onlyOne) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(peerCredentials{}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := o.check(ctx); err != nil {
				return nil, err
			}
			return handle(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := o.check(s.Context()); err != nil {
				return err
			}
			return handle(srv, s)
		}),
	}
}

// check refuses the call of a second collector.
func (o *onlyOne) check(ctx context.Context) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	caller, ok := p.AuthInfo.(peerInfo)
	if !ok || caller.pid == 0 { // of another pid namespace: nothing can be said
		return nil
	}
	return o.admit(caller.pid)
}

func (o *onlyOne) admit(pid int32) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if pid == o.pid {
		return nil // while it can call, it has not ended
	}
	caller, err := o.look(pid)
	if err != nil || !collects(caller.program) {
		return nil //nolint:nilerr // a process that has ended does not see the answer
	}
	if o.pid != 0 {
		if now, err := o.look(o.pid); err == nil && now == o.owner {
			if o.warned[pid] != caller {
				o.warned[pid] = caller
				o.log.Error("a second program uses this node's snapshotter and is refused: both collect garbage, and each would delete the other's snapshots; give the second program a node of its own, with another root and other sockets",
					"program", caller.program, "pid", pid, "first", o.owner.program, "first_pid", o.pid)
			}
			return status.Errorf(codes.FailedPrecondition, "shoal: %s (pid %d) uses this node already, and %s (pid %d) would delete its snapshots: give each a node of its own",
				o.owner.program, o.pid, caller.program, pid)
		}
	}
	o.pid, o.owner = pid, caller
	clear(o.warned)
	return nil
}

// collects reports whether a program is a collector.
func collects(program string) bool {
	for _, c := range collectors {
		if program == c || strings.HasPrefix(program, c+"-") && !strings.Contains(program, "shim") {
			return true
		}
	}
	return false
}

// lookAt is onlyOne.look.
func lookAt(pid int32) (process, error) {
	dir := filepath.Join("/proc", fmt.Sprint(pid))
	exe, err := os.Readlink(filepath.Join(dir, "exe"))
	if err != nil {
		return process{}, err
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return process{}, err
	}
	// "pid (name) state ppid ...": the name may have anything in it, and the time of
	// the start is field 22.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return process{}, os.ErrProcessDone
	}
	// An upgrade replaces the file of a running program.
	return process{program: filepath.Base(strings.TrimSuffix(exe, " (deleted)")), started: fields[19]}, nil
}

// peerInfo says which process is at the other end of a connection.
type peerInfo struct {
	credentials.CommonAuthInfo
	pid int32
}

// AuthType implements credentials.AuthInfo.
func (peerInfo) AuthType() string { return "peercred" }

// peerCredentials finds it out, and leaves the connection as it is.
type peerCredentials struct{}

var errOnlyServer = errors.New("these credentials are a server's")

func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := peerInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return c, info, nil
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var serr error
	if err := raw.Control(func(fd uintptr) { cred, serr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, nil, err
	}
	if serr != nil {
		return nil, nil, serr
	}
	info.pid = cred.Pid
	return c, info, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errOnlyServer
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "insecure"}
}

func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

func (peerCredentials) OverrideServerName(string) error { return nil }
