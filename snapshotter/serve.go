package snapshotter

import (
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"google.golang.org/grpc"
)

// Register makes sn a service of a gRPC server, as containerd's proxy plugins of
// type "snapshot" expect it. The plugin should have the capability "remap-ids", or
// containerd copies an image for each range of ids; it must not have "rebase",
// since containerd then asks for layers without their parents, which cannot be lazy.
func Register(server grpc.ServiceRegistrar, sn snapshots.Snapshotter) {
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
}
