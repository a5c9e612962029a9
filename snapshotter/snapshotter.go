package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/tasks"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// Snapshotter implements containerd's snapshots.Snapshotter and snapshots.Cleaner.
// Methods return errors of the errdefs classes.
type Snapshotter struct {
	cfg    Config
	log    *slog.Logger
	images *images.Catalogue
	meta   *metaStore
	dirs
	clones  *clones
	options []string // overlayfs' for every mount

	tasks    *tasks.Group
	cleaning chan struct{} // held by the caller that cleans up
	closed   sync.Once
	closeErr error // that of the first Close

	unknown  unknown
	remapped sync.Once // for explainRemapped
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens a snapshotter, puts right what an earlier process has left half done,
// starts the catalogue of images, and begins to mount, in the background, what active
// snapshots use. The caller must Close it, before the catalogue.
func New(cfg Config) (*Snapshotter, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	s := &Snapshotter{
		cfg: cfg, log: cfg.Log, images: cfg.Images, dirs: dirs{cfg.Root, cfg.Log}, tasks: tasks.New(), cleaning: make(chan struct{}, 1),
		unknown: unknown{log: cfg.Log},
	}
	s.clones = newClones(s.dirs)
	for _, dir := range []string{"", "s", "scratch", "l"} {
		if err := os.MkdirAll(filepath.Join(cfg.Root, dir), 0o700); err != nil {
			return nil, err
		}
	}
	if ok, err := fs.SupportsDType(cfg.Root); err != nil {
		return nil, fmt.Errorf("file system of %s: %w", cfg.Root, err)
	} else if !ok {
		return nil, fmt.Errorf("file system of %s has no d_type, which overlayfs needs (xfs: format it with ftype=1)", cfg.Root)
	}
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		// As containerd's overlayfs snapshotter: the index makes upper directories
		// refuse to be used again.
		s.options = append(s.options, "index=off")
	}
	if s.stableInodes() {
		s.options = append(s.options, "xino=on")
	}
	var err error
	if s.meta, err = openMetadata(cfg.Root, s.log); err != nil {
		return nil, err
	}
	if err := s.start(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// stableInodes reports whether overlayfs takes xino=on here. Each block image is a file
// system of its own. Without the option, overlayfs then shows a device number for
// each of them, so that du -x, find -xdev and whatever else stays on one file
// system leaves out the image's files, and gives directories a new inode number
// whenever they were dropped from memory, which tar and git see as another
// directory. With it there is one device number, and inode numbers stay.
func (s *Snapshotter) stableInodes() bool {
	dir, err := os.MkdirTemp(s.scratch(), "xino-")
	if err != nil {
		return false
	}
	defer s.removeDir(dir)
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"a", "b", "m"} {
		if err := os.Mkdir(at(name), 0o700); err != nil {
			return false
		}
	}
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: []string{"xino=on", "lowerdir=" + at("a") + ":" + at("b")}}
	if err := m.Mount(at("m")); err != nil {
		s.log.Debug("overlayfs does not take xino=on", "error", err)
		return false
	}
	if err := mount.UnmountAll(at("m"), 0); err != nil {
		s.log.Warn("cannot unmount a test mount", "path", at("m"), "error", err)
	}
	return true
}

// Close ends background work and calls that wait. What is mounted stays mounted. A
// second call does nothing.
func (s *Snapshotter) Close() error {
	s.closed.Do(func() {
		s.tasks.Close()
		s.closeErr = s.meta.Close()
	})
	return s.closeErr
}

// Stat returns the info of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, s.unknown.explain(key, err)
}

// Update changes labels. Those that make a snapshot a lazy one stay as they are.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, old, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		info, fieldpaths := guard(info, old, fieldpaths)
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Usage of a lazy snapshot is what its diff takes on this node once it is complete:
// CRI, and so kubelet, asks once, right after the pull, and believes that for
// ever. Other snapshots with the same diff report it, too. A diff that is lost
// takes nothing.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var (
		id   string
		info snapshots.Info
	)
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return usage, err
	}
	if info.Kind == snapshots.KindActive {
		ctx, cancel := s.limit(ctx)
		defer cancel()
		du, err := fs.DiskUsage(ctx, s.upper(id))
		return snapshots.Usage(du), err
	}
	diff, lazy, err := diffOf(info)
	if err != nil || !lazy {
		return usage, err
	}
	bytes, inodes, err := s.images.FullUse(diff)
	if err != nil {
		return usage, classify(err)
	}
	usage.Size += bytes
	usage.Inodes += inodes
	return usage, nil
}

// Prepare makes a writable snapshot, or, where labels ask for an image layer that
// can be lazy, a committed one: the error is then AlreadyExists.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes a snapshot that is mounted read-only. For labels see Prepare.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

// Mounts returns the mounts of an active snapshot or a view, with the block images
// of its lazy layers mounted.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var (
		sn    storage.Snapshot
		info  snapshots.Info
		links []link
	)
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if sn, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		if _, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		links, err = readChain(ctx, info.Parent)
		return err
	})
	if err != nil {
		return nil, s.unknown.explain(key, err)
	}
	ctx, cancel := s.limit(ctx)
	defer cancel()
	lowers, err := s.lowers(ctx, links)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, err)
	}
	mounts, err := s.mounts(sn, info, links, lowers)
	if err == nil {
		s.containerStarts(key, sn.ID, info, links)
	}
	return mounts, err
}

// Commit makes an active snapshot a committed one.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := callersInfo(opts)
	if err != nil {
		return err
	}
	var id string
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	// Before the write transaction, which all others wait for; a snapshot that is
	// written to while it is committed has no exact usage anyhow.
	limited, cancel := s.limit(ctx)
	defer cancel()
	usage, err := fs.DiskUsage(limited, s.upper(id))
	if err != nil && errors.Is(context.Cause(limited), images.ErrSlow) {
		s.log.Warn("the size of a snapshot is not known: counting its files took longer than containerd may wait", "snapshot", name, "limit", s.cfg.PrepareTimeout)
		err, usage = nil, fs.Usage{}
	}
	if err != nil {
		return err
	}
	// Nothing looks at them any more. Before the transaction, so that a crash leaves none in a
	// committed snapshot.
	if err := s.clones.drop(id); err != nil {
		return err
	}
	return s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, key, name, snapshots.Usage(usage), replace(info))
		return err
	})
}

// Remove makes a snapshot unavailable. Its disk space, and a diff that it was the
// last to use, go with the next Cleanup, which containerd calls after each garbage
// collection.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var (
		diff blockdev.Digest
		lazy bool
	)
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if diff, lazy, err = diffOf(info); err != nil {
			return err
		}
		_, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	s.images.ContainerEnds(key)
	if lazy {
		s.images.DropSnapshot(diff)
	}
	return err
}

// Walk calls fn for all snapshots that match the filters.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, fn, filters...)
	})
}

// replace sets all of info at once, as the labels of the caller have been sifted.
func replace(info snapshots.Info) snapshots.Opt {
	return func(i *snapshots.Info) error {
		*i = info
		return nil
	}
}

// classify gives an error of the data path its class. It is never NotFound: the
// snapshot is there.
func classify(err error) error {
	switch {
	case errors.Is(err, images.ErrSlow):
		return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, blockdev.ErrNoSpace):
		return fmt.Errorf("%w: %w", errdefs.ErrResourceExhausted, err)
	case errors.Is(err, blockdev.ErrQuarantined):
		return fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, err)
	case errors.Is(err, blockdev.ErrCorrupt):
		return fmt.Errorf("%w: %w", errdefs.ErrDataLoss, err)
	case errors.Is(err, blockdev.ErrUnavailable), errors.Is(err, blockdev.ErrNotFound), errors.Is(err, io.EOF):
		return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	default:
		return fmt.Errorf("%w: %w", errdefs.ErrInternal, err)
	}
}
