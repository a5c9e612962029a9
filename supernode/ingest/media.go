package ingest

import (
	"fmt"
	"strings"

	"github.com/shoalfs/shoal/blockdev"
)

// layerTypes are the media types of layers that are tar streams. Their
// compression is found out from the bytes, as containerd does: the names are
// often wrong, and Docker's plain type may be compressed.
var layerTypes = map[string]bool{
	"application/vnd.oci.image.layer.v1.tar":                       true,
	"application/vnd.oci.image.layer.v1.tar+gzip":                  true,
	"application/vnd.oci.image.layer.v1.tar+zstd":                  true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": true,
	"application/vnd.docker.image.rootfs.diff.tar":                 true,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            true,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            true,
	"application/vnd.docker.image.rootfs.foreign.diff.tar":         true,
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    true,
}

const schema1Type = "application/vnd.docker.container.image.rootfs.diff+x-gtar"

// checkMediaType returns an error that wraps blockdev.ErrUnsupported for what is
// no tar layer.
func checkMediaType(t string) error {
	switch {
	case layerTypes[t]:
		return nil
	case strings.HasSuffix(t, "+encrypted"):
		return fmt.Errorf("the layer is encrypted (%.120q): %w", t, blockdev.ErrUnsupported)
	case t == schema1Type:
		return fmt.Errorf("the layer is of a schema 1 manifest: %w", blockdev.ErrUnsupported)
	default:
		return fmt.Errorf("layer media type %.120q: %w", t, blockdev.ErrUnsupported)
	}
}

// foreign tells whether a layer of this type need not be in the registry.
func foreign(t string) bool {
	return strings.Contains(t, ".foreign.") || strings.Contains(t, ".nondistributable.")
}
