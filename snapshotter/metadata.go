package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
)

const (
	metadataFile = "metadata.db"
	// asideSuffix is what the name of a damaged database gets, and that of what goes
	// with it.
	asideSuffix = ".damaged"
)

// metaStore is containerd's store of snapshots.
type metaStore struct {
	*storage.MetaStore
	root string
}

// openMetadata opens it. If it is damaged, it is set aside, loudly, and a new one begun.
func openMetadata(root string, log *slog.Logger) (*metaStore, error) {
	err := inspectMetadata(root)
	switch {
	case errors.Is(err, blockdev.ErrCorrupt):
		err = setMetadataAside(root, err, log)
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	}
	if err != nil {
		return nil, err
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, metadataFile))
	return &metaStore{ms, root}, err
}

// inspectMetadata checks it while nobody has it open. The error wraps fs.ErrNotExist if
// there is none, as on a new node, and blockdev.ErrCorrupt if it is damaged or lost.
func inspectMetadata(root string) error {
	if err := metadataLost(root); err != nil {
		return err
	}
	return boltcheck.File(filepath.Join(root, metadataFile), nil)
}

// metadataLost returns an error that wraps blockdev.ErrCorrupt if there is no
// metadata, or a file without anything in it, and yet there are directories of
// snapshots: a repair of the file system, a restore or a slip has taken it away, and
// running containers may write to these directories.
func metadataLost(root string) error {
	st, err := os.Stat(filepath.Join(root, metadataFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && st.Size() > 0 {
		return nil
	}
	dirs, err := os.ReadDir(filepath.Join(root, "s"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) || len(dirs) == 0 {
		return err
	}
	return fmt.Errorf("%s is missing or empty, but there are directories of %d snapshots: %w", metadataFile, len(dirs), blockdev.ErrCorrupt)
}

// setMetadataAside makes way for a new metadata.db. The directories of snapshots go
// with it: running containers write to them. After a crash in the middle, the next
// start goes on.
func setMetadataAside(root string, cause error, log *slog.Logger) error {
	aside, err := boltcheck.SetAside(filepath.Join(root, metadataFile))
	if err != nil {
		return err
	}
	// It tells Lost, also if there was nothing to set aside.
	mark, err := os.OpenFile(aside, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := mark.Close(); err != nil {
		return err
	}
	dirs := filepath.Join(root, "s")
	dirsAside := dirs + asideSuffix
	for n := 2; ; n++ { // what was set aside before may be in use still
		if _, err := os.Lstat(dirsAside); errors.Is(err, fs.ErrNotExist) {
			break
		}
		dirsAside = fmt.Sprintf("%s%s-%d", dirs, asideSuffix, n)
	}
	if err := os.Rename(dirs, dirsAside); err != nil {
		return err
	}
	log.Error("the snapshots' metadata is damaged or lost; it was set aside, with the directories that containers write to; running containers go on. "+
		"Remove all containers and images of this snapshotter, and pull the images again; the node deletes no layer until you delete the files that were set aside",
		"aside", []string{aside, dirsAside}, "error", cause)
	return os.Mkdir(dirs, 0o700)
}

// Lost says that a metadata.db was set aside, so that nobody knows what running
// containers use.
func (m *metaStore) Lost() bool {
	_, err := os.Lstat(filepath.Join(m.root, metadataFile+asideSuffix))
	return err == nil
}

// Chains returns the ChainIDs of all lazy snapshots.
func (m *metaStore) Chains(ctx context.Context) (map[string]struct{}, error) {
	chains := make(map[string]struct{})
	err := m.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, info snapshots.Info) error {
			if _, lazy := info.Labels[labelDiff]; lazy {
				chains[info.Labels[labelRef]] = struct{}{}
			}
			return nil
		})
	})
	if errdefs.IsNotFound(err) { // never had a snapshot
		err = nil
	}
	return chains, err
}
