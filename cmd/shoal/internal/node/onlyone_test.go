package node

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/shoalfs/shoal/internal/control"
)

// TestOnlyOne: the first collector is served until it has ended, a second one is not,
// once in the log; other programs are.
func TestOnlyOne(t *testing.T) {
	var log bytes.Buffer
	o := newOnlyOne(slog.New(slog.NewTextHandler(&log, nil)))
	running := map[int32]process{
		7: {"containerd", "100"}, 8: {"containerd", "200"}, 9: {"lab.test", "300"}, 10: {"buildkitd", "400"}, 11: {"containerd-newest", "500"},
	}
	o.look = func(pid int32) (process, error) {
		p, ok := running[pid]
		if !ok {
			return p, os.ErrProcessDone
		}
		return p, nil
	}
	admit := func(pid int32, want bool) {
		t.Helper()
		if err := o.admit(pid); (err == nil) != want {
			t.Errorf("pid %d: %v", pid, err)
		} else if err != nil && (status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "pid 7")) {
			t.Errorf("pid %d: %v does not say who is first", pid, err)
		}
	}
	admit(9, true)
	admit(7, true)
	admit(9, true)
	for range 3 {
		admit(8, false)
	}
	admit(10, false)
	admit(11, false)
	admit(7, true)
	if n := strings.Count(log.String(), "a second program"); n != 3 {
		t.Errorf("the log names a second program %d times, want each of 3 once:\n%s", n, log.String())
	}
	running[7] = process{"containerd", "999"} // its pid, another process: the first has ended
	admit(8, true)
	delete(running, 8)
	admit(7, true)
}

// TestOnlyOneOverSocket: the process behind a connection is found out.
func TestOnlyOneOverSocket(t *testing.T) {
	o := newOnlyOne(slog.New(slog.DiscardHandler))
	var asked []int32
	o.look = func(pid int32) (process, error) {
		asked = append(asked, pid)
		if pid == 1 {
			return process{"containerd", "1"}, nil
		}
		return process{"containerd", "2"}, nil
	}
	if err := o.admit(1); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	ln, err := control.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(o.options()...)
	snapshotsapi.RegisterSnapshotsServer(server, snapshotsapi.UnimplementedSnapshotsServer{})
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	defer func() { server.Stop(); <-done }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := snapshotsapi.NewSnapshotsClient(conn)
	if _, err := client.Remove(context.Background(), &snapshotsapi.RemoveSnapshotRequest{}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a call of a second collector: %v", err)
	}
	list, err := client.List(context.Background(), &snapshotsapi.ListSnapshotsRequest{})
	if err == nil {
		_, err = list.Recv()
	}
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a stream of a second collector: %v", err)
	}
	if len(asked) < 3 || asked[1] != int32(os.Getpid()) {
		t.Errorf("looked at processes %v, want this one, %d", asked, os.Getpid())
	}
}

func TestLookAt(t *testing.T) {
	p, err := lookAt(int32(os.Getpid()))
	if err != nil || !strings.HasSuffix(p.program, ".test") || p.started == "" {
		t.Errorf("this process is %+v, %v", p, err)
	}
	if _, err := lookAt(1 << 30); err == nil {
		t.Error("a process that is not there was found")
	}
}
