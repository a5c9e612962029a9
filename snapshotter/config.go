package snapshotter

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// Config is what New needs.
type Config struct {
	// Root is the absolute directory for metadata and ordinary snapshots. Its file
	// system must serve as overlayfs' upper layer. Created if missing.
	Root string
	// Images is the catalogue of this node's images. New starts it.
	Images *images.Catalogue
	// PrepareTimeout bounds how long a call of containerd waits for anything that is
	// not on this machine, and for long work on it; 0: 3 seconds. A Prepare that
	// ends so makes containerd unpack the layer. What is under way goes on.
	//
	// containerd holds a lock over these calls: its garbage collection waits for
	// them, and all of its other calls to this snapshotter for that.
	PrepareTimeout time.Duration
	// Log takes all messages; nil: none.
	Log *slog.Logger
}

func (c *Config) setDefaults() error {
	if c.Root == "" || !filepath.IsAbs(c.Root) {
		return fmt.Errorf("snapshotter: Root %q is not an absolute path", c.Root)
	}
	if c.Images == nil {
		return errors.New("snapshotter: Images is missing")
	}
	if c.PrepareTimeout < 0 {
		return errors.New("snapshotter: PrepareTimeout must not be negative")
	}
	defaults.Set(&c.PrepareTimeout, 3*time.Second)
	defaults.Log(&c.Log)
	return nil
}
