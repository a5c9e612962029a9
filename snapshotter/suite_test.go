package snapshotter

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/shoalfs/shoal/snapshotter/images"
)

// suiteName is overlayfs' as far as the suite is concerned: renaming a directory of
// a lower layer gives EXDEV there, which the suite knows by this name alone.
const suiteName = "overlayfs"

func TestSuite(t *testing.T) {
	needRoot(t)
	testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, c, err := open(nodeConfig{Config: images.Config{Root: filepath.Join(root, "snap"), Data: newFakeData(t, filepath.Join(root, "data"))}})
		if err != nil {
			return nil, nil, err
		}
		return s, func() error { return errors.Join(s.Close(), c.Close()) }, nil
	})
}

// TestSuiteProxy is the same through gRPC, as containerd uses a proxy plugin.
func TestSuiteProxy(t *testing.T) {
	needRoot(t)
	testsuite.SnapshotterSuite(t, suiteName, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, c, err := open(nodeConfig{Config: images.Config{Root: filepath.Join(root, "snap"), Data: newFakeData(t, filepath.Join(root, "data"))}})
		if err != nil {
			return nil, nil, err
		}
		client, stop, err := serve(filepath.Join(root, "sock"), s)
		return client, func() error { stop(); return errors.Join(s.Close(), c.Close()) }, err
	})
}

// serve gives containerd's client of a snapshotter behind a socket.
func serve(socket string, s snapshots.Snapshotter) (snapshots.Snapshotter, func(), error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, func() {}, err
	}
	server := grpc.NewServer()
	Register(server, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		server.Stop()
		<-done
		return nil, func() {}, err
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "shoal"), func() {
		_ = conn.Close()
		server.Stop()
		<-done
	}, nil
}
