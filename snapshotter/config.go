package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// Data is the data path: it keeps local diffs and mounts their block images.
// Its methods may be called from several goroutines.
type Data interface {
	// Add takes an encoded index and returns the DiffID in it. Adding a diff that
	// is there already is no error. It does not keep the slice.
	Add(ctx context.Context, encodedIndex []byte) (blockdev.Digest, error)
	// Mount mounts the diff's block image, unless it is mounted, and returns the
	// absolute path of the mount. One that is known to be wrong is refused with
	// blockdev.ErrQuarantined, mounted or not.
	Mount(ctx context.Context, diffID blockdev.Digest) (dir string, err error)
	// Remove unmounts the diff, stops its prefetch and frees its bytes. Removing a
	// diff that is not there is no error.
	Remove(ctx context.Context, diffID blockdev.Digest) error
	// ContainerStarts says that a container on these diffs is about to read.
	ContainerStarts(ids ...blockdev.Digest)
	// Prefetch queues the missing bytes of these diffs to be fetched in the
	// background, in this order, and returns at once.
	Prefetch(ids ...blockdev.Digest)
	// StopPrefetch ends that, but for diffs that PrefetchWait waits for, and returns
	// at once. What has come stays.
	StopPrefetch(ids ...blockdev.Digest)
	// Incomplete reports whether the diff is there and bytes of it are missing.
	Incomplete(id blockdev.Digest) bool
}

// Has is an optional part of Data: whether the diff has been added and is sound.
// Without it, what was added is taken to be there until it is removed.
type Has interface {
	Has(diffID blockdev.Digest) bool
}

// Lister is an optional part of Data: all diffs that it has. With it, diffs are
// found and removed at start that no record of the snapshotter names.
type Lister interface {
	Diffs() []blockdev.Digest
}

// FullUse is an optional part of Data: what a diff takes of the disk once it is
// complete, in bytes and inodes. Without it, lazy snapshots report no usage.
type FullUse interface {
	FullUse(diffID blockdev.Digest) (bytes, inodes int64, err error)
}

// Implied is an optional part of Data: blockdev.Index.Implied of a diff. Without it,
// diffs whose records were lost are not listed anew.
type Implied interface {
	Implied(diffID blockdev.Digest) ([]string, error)
}

// PrefetchWaiter is an optional part of Data, needed for LabelPrefetch:
// PrefetchWait returns nil when every byte of the diff is local and verified, and
// shown to be what the DiffID says.
type PrefetchWaiter interface {
	PrefetchWait(ctx context.Context, diffID blockdev.Digest) error
}

// Complete is an optional part of Data: whether every byte of a diff is local, so
// that no source is needed for it.
type Complete interface {
	Complete(diffID blockdev.Digest) bool
}

// CheckedAdder is an optional part of Data: Add, which shows the decoded index to check
// and ends with its error. So the index is decoded once while a pull waits, and within
// the bounds that Data has for that.
type CheckedAdder interface {
	AddChecked(ctx context.Context, encodedIndex []byte, check func(*blockdev.Index) error) (blockdev.Digest, error)
}

// StartupFetcher is an optional part of Data: it begins to fetch what containers
// of an image are known to read at their start, and returns at once.
type StartupFetcher interface {
	FetchStartup(profiles []blockdev.DiffProfile)
}

// Credentials gives the node's credential for the registry host of an image
// reference. No credential is the zero value and no error.
type Credentials interface {
	Credential(ctx context.Context, ref string) (blockdev.Credential, error)
}

// Config is what New needs.
type Config struct {
	// Root is the absolute directory for metadata and ordinary snapshots. Its file
	// system must serve as overlayfs' upper layer. Created if missing.
	Root string
	// Data is the data path. It outlives the snapshotter, which does not close it.
	Data Data
	// Images is where indexes come from; nil: no image is lazy.
	Images blockdev.ImageSource
	// Credentials are the node's own: for KeepImage, and for the sources of images
	// that are here already; nil: anonymous access only. Pulls show theirs (Begin).
	Credentials Credentials
	// NodeCredentials: pulls that show none are opened with Credentials, so that
	// whoever can pull on this machine has what these open.
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
	// Groups is told which images are here; nil: nobody is.
	Groups Groups
	// Platform goes into requests for an image whose manifest the caller does not
	// name (KeepImage).
	Platform blockdev.Platform
	// IndexTimeout bounds how long it may take to get the indexes of an image and
	// to mount its diffs. 0: 5 minutes, since a cold supernode may have to fetch the
	// whole image first, which is what containerd would do instead. A supernode that
	// cannot be reached should make Images fail well before.
	IndexTimeout time.Duration
	// PrepareTimeout bounds how long a call of containerd waits for anything that is
	// not on this machine, and for long work on it; 0: 3 seconds. A Prepare that
	// ends so has the layer unpacked in the ordinary way. What is under way goes on.
	//
	// containerd holds a lock over these calls: its garbage collection waits for
	// them, and all of its other calls to this snapshotter for that.
	PrepareTimeout time.Duration
	// PullIdle is for how long after its last Prepare a pull's decision stands, and
	// the indexes it has opened are kept for layers still to come. 0: 15 minutes.
	PullIdle time.Duration
	// Log takes all messages; nil: none.
	Log *slog.Logger
}

func (c *Config) complete() error {
	if c.Root == "" || !filepath.IsAbs(c.Root) {
		return fmt.Errorf("snapshotter: Root %q is not an absolute path", c.Root)
	}
	if c.Data == nil {
		return errors.New("snapshotter: Data is missing")
	}
	if c.IndexTimeout < 0 || c.PrepareTimeout < 0 || c.PullIdle < 0 {
		return errors.New("snapshotter: IndexTimeout, PrepareTimeout and PullIdle must not be negative")
	}
	if c.IndexTimeout == 0 {
		c.IndexTimeout = 5 * time.Minute
	}
	if c.PrepareTimeout == 0 {
		c.PrepareTimeout = 3 * time.Second
	}
	if c.PullIdle == 0 {
		c.PullIdle = 15 * time.Minute
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}
