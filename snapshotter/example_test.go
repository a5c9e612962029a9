package snapshotter_test

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc"

	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// serve is a node's snapshotter, from opening the catalogue of images to the socket that
// containerd's proxy plugin connects to.
func serve(ctx context.Context, root string, vols *volume.Manager, supernode image.Source, socket net.Listener) (err error) {
	catalogue, err := images.Open(images.Config{Root: root, Data: vols, Images: supernode})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, catalogue.Close()) }()
	// What brings the bytes of images that are here already may use the catalogue from
	// now on: catalogue.Rewarm, Origins and SourceCredential.

	sn, err := snapshotter.New(snapshotter.Config{Root: root, Images: catalogue})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()

	server := grpc.NewServer()
	snapshotter.Register(server, sn)
	defer context.AfterFunc(ctx, server.Stop)()
	return server.Serve(socket)
}

// Example serves the snapshotter that containerd's config calls
// [proxy_plugins.shoal] type = "snapshot", address = "/run/shoal/shoal.sock".
func Example() {
	var (
		vols      *volume.Manager // of volume.Open
		supernode image.Source    // p2p/uplink, or a supernode in this process
	)
	socket, err := net.Listen("unix", "/run/shoal/shoal.sock")
	if err != nil {
		panic(err)
	}
	if err := serve(context.Background(), "/var/lib/shoal", vols, supernode, socket); err != nil {
		panic(err)
	}
}
