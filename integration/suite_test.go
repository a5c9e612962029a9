package integration

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// TestContainerdSuite runs containerd's own conformance suite on real `shoal
// node` processes, spoken to as containerd speaks to a proxy plugin.
func TestContainerdSuite(t *testing.T) {
	bin(t) // skips without root
	// The suite knows by this name that overlayfs cannot rename a directory of a
	// lower layer; it excuses nothing else.
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		l := newLab(t)
		node, err := l.StartNode(ctx, "n"+filepath.Base(root)[:min(8, len(filepath.Base(root)))], "", "")
		if err != nil {
			return nil, nil, err
		}
		conn, err := grpc.NewClient("unix://"+node.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "shoal")
		return sn, func() error { return errors.Join(sn.Close(), conn.Close(), node.Stop()) }, nil
	})
}
