package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// Data is the data path: it keeps local diffs, mounts their block images and fetches
// what is missing of them. Its methods may be called from several goroutines. All but
// AddChecked, Mount, Remove and PrefetchWait return at once.
type Data interface {
	// AddChecked takes an encoded index, which it decodes and shows to check, and
	// returns the DiffID in it. An error of check ends it. Adding a diff that is there
	// already is no error. It does not keep the slice.
	AddChecked(ctx context.Context, encodedIndex []byte, check func(*blockdev.Index) error) (blockdev.Digest, error)
	// Mount mounts the diff's block image, unless it is mounted, and returns the
	// absolute path of the mount. The error wraps blockdev.ErrNotFound if the diff is
	// not there, and blockdev.ErrQuarantined if it is known to be wrong, mounted or not.
	Mount(ctx context.Context, diffID blockdev.Digest) (dir string, err error)
	// Remove unmounts the diff, stops its prefetch and frees its bytes. Removing a
	// diff that is not there is no error.
	Remove(ctx context.Context, diffID blockdev.Digest) error
	// Has reports whether the diff has been added and is sound.
	Has(diffID blockdev.Digest) bool
	// Diffs returns all diffs that have been added, in no order.
	Diffs() []blockdev.Digest
	// Implied returns blockdev.Index.Implied of a diff. The error wraps
	// blockdev.ErrNotFound if the diff is not there.
	Implied(diffID blockdev.Digest) ([]string, error)
	// FullUse returns what a diff takes of the disk once it is complete. The error wraps
	// blockdev.ErrNotFound if the diff is not there.
	FullUse(diffID blockdev.Digest) (bytes, inodes int64, err error)
	// PrefetchWait fetches what is missing of the diff and returns nil when every byte
	// is local and verified, and shown to be what the DiffID says. progress, if not nil,
	// is called with the bytes that are local and all there are. The error wraps
	// blockdev.ErrNotFound if the diff is not there.
	PrefetchWait(ctx context.Context, diffID blockdev.Digest, progress func(local, total int64)) error
	// FetchStartup begins to fetch what containers of an image are known to read at
	// their start.
	FetchStartup(profiles []blockdev.DiffProfile)
	// ContainerStarts says that a container on these diffs is about to read.
	ContainerStarts(ids ...blockdev.Digest)
	Prefetcher
}

// Prefetcher is the part of Data that fetches in the background. Diffs that are not
// there are passed over.
type Prefetcher interface {
	// Prefetch queues the missing bytes of these diffs to be fetched, in this order.
	Prefetch(ids ...blockdev.Digest)
	// StopPrefetch ends that, but for diffs that PrefetchWait waits for. Bytes that
	// have come stay.
	StopPrefetch(ids ...blockdev.Digest)
	// Incomplete reports whether the diff is there and bytes of it are missing.
	Incomplete(id blockdev.Digest) bool
}

// Credentials gives the node's credential for the registry host of an image
// reference. No credential is the zero value and no error.
type Credentials interface {
	Credential(ctx context.Context, ref string) (image.Credential, error)
	// Explain adds to an error that wraps blockdev.ErrUnauthorized why there was no
	// credential, if one should have been; other errors come back as they are.
	Explain(err error) error
}

// Config is what Open needs.
type Config struct {
	// Root is the absolute directory for the records, the snapshotter's. Created if missing.
	Root string
	// Data is the data path. It outlives the catalogue, which does not close it.
	Data Data
	// Images is where indexes come from; nil: no image is lazy.
	Images image.Source
	// Credentials are the node's own: for Keep, and for the sources of images
	// that are here already; nil: anonymous access only. Pulls show theirs (Begin).
	Credentials Credentials
	// NodeCredentials: pulls that show none are opened with Credentials, so that
	// each user that can pull on this machine has what these open.
	NodeCredentials bool
	// Remote: Images is on another machine, where names like localhost mean something
	// else.
	Remote bool
	// Policy says which images may be lazy, and what of them is prefetched; nil: every
	// one, and all.
	Policy *policy.Policy
	// PrefetchAfterPull has an image fetched whole that no container has followed yet;
	// PrefetchAfterExit has it fetched on when its last container has ended. Both only
	// where Policy has all of it fetched.
	PrefetchAfterPull, PrefetchAfterExit bool
	// Groups learns which images are here; may be nil.
	Groups Groups
	// Platform goes into requests for an image whose manifest the caller does not
	// name (Keep).
	Platform image.Platform
	// IndexTimeout bounds how long it may take to get the indexes of an image and
	// to mount its diffs. 0: 5 minutes, since a cold supernode may have to fetch the
	// whole image first, which is what containerd would do instead. A supernode that
	// cannot be reached should make Images fail well before.
	IndexTimeout time.Duration
	// PullIdle is for how long after its last Prepare a pull's decision stands, and
	// the indexes it has opened are kept for layers still to come. 0: 15 minutes.
	PullIdle time.Duration
	// Pulled is called for each pull of an image: with nil if it is lazy now, or with why it
	// is not. It does not wait. nil: no call.
	Pulled func(ref string, why *Refusal)
	// Log takes all messages; nil: none.
	Log *slog.Logger
}

func (c *Config) setDefaults() error {
	if c.Root == "" || !filepath.IsAbs(c.Root) {
		return fmt.Errorf("images: Root %q is not an absolute path", c.Root)
	}
	if c.Data == nil {
		return errors.New("images: Data is missing")
	}
	if c.IndexTimeout < 0 || c.PullIdle < 0 {
		return errors.New("images: IndexTimeout and PullIdle must not be negative")
	}
	defaults.Set(&c.IndexTimeout, 5*time.Minute)
	defaults.Set(&c.PullIdle, 15*time.Minute)
	if c.Pulled == nil {
		c.Pulled = func(string, *Refusal) {}
	}
	defaults.Log(&c.Log)
	return nil
}
