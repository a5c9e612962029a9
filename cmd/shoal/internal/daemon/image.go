package daemon

import (
	"fmt"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"

	"github.com/shoalfs/shoal/internal/image"
)

// Normalize turns "redis" into "docker.io/library/redis:latest", as containerd's
// clients do before they pull.
func Normalize(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("%q is not an image reference: %w", ref, err)
	}
	return named.String(), nil
}

// Platform is this machine's, which is chosen from multi-platform images.
func Platform() image.Platform {
	p := platforms.DefaultSpec()
	return image.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}
}
