package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/durable"
)

// A diff whose index another version of the builder has made may get a tree of its
// own when it is proven: the one that this node makes. It lies beside the given one,
// since mounts of that are in use, and since the given index is what other nodes are
// given, who know its SHA-256.
const (
	ownIndexFile = "index.own"
	ownMetaFile  = "meta.own"
)

// ownTree is the tree that a diff shows in place of the one that its index came with.
type ownTree struct {
	sum blockdev.Digest // of the file index.own
}

func (d *Diff) path(name string) string { return filepath.Join(d.dir, name) }

// takeOver writes the tree of an index down and returns the SHA-256 of its file. It is
// shown when the record of the proof names that.
func (d *Diff) takeOver(ctx context.Context, own *blockdev.Index) (blockdev.Digest, error) {
	enc, err := index.Encode(own)
	if err != nil {
		return blockdev.Digest{}, err
	}
	need := d.c.room.Blocks(0, int64(len(enc))) + d.c.room.Blocks(0, int64(len(own.Meta)))
	if err := d.c.room.Take(ctx, &d.share, need, room.ForMeta); err != nil {
		return blockdev.Digest{}, err
	}
	defer func() {
		d.c.room.Wrote(&d.share, need)
		d.c.room.Remeasure(&d.share)
	}()
	if err := errors.Join(durable.Sweep(d.dir), durable.Replace(d.path(ownMetaFile), own.Meta, 0o600), durable.Replace(d.path(ownIndexFile), enc, 0o600)); err != nil {
		return blockdev.Digest{}, d.c.room.Failed(d.id, err)
	}
	return blockdev.Sum(enc), nil
}

// loadOwn shows the tree that was taken over, of which sum is on record.
func (d *Diff) loadOwn(sum blockdev.Digest) error {
	enc, err := d.encodedOwn(sum)
	if err != nil {
		return err
	}
	ix, done, err := d.c.decode(d.c.life, enc)
	if err != nil {
		return err
	}
	defer done()
	if ix.DiffID != d.id {
		return fmt.Errorf("%s is the index of diff %v: %w", d.path(ownIndexFile), ix.DiffID, blockdev.ErrCorrupt)
	}
	if err := d.fixMeta(d.path(ownMetaFile), ix.Meta); err != nil {
		return err
	}
	d.own.Store(&ownTree{sum: sum})
	return nil
}

// encodedOwn reads the file whose SHA-256 is on record.
func (d *Diff) encodedOwn(sum blockdev.Digest) ([]byte, error) {
	enc, err := os.ReadFile(d.path(ownIndexFile))
	if err != nil {
		return nil, err
	}
	if blockdev.Sum(enc) != sum {
		return nil, fmt.Errorf("%s is not the one on record: %w", d.path(ownIndexFile), blockdev.ErrCorrupt)
	}
	return enc, nil
}

func (d *Diff) readOwn(sum blockdev.Digest) (*blockdev.Index, error) {
	enc, err := d.encodedOwn(sum)
	if err != nil {
		return nil, err
	}
	ix, err := index.Decode(enc)
	if err == nil && ix.DiffID != d.id {
		err = fmt.Errorf("it is the index of diff %v: %w", ix.DiffID, blockdev.ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.path(ownIndexFile), err)
	}
	return ix, nil
}

// fixMeta makes a metadata image the one that its index has.
func (d *Diff) fixMeta(path string, meta []byte) error {
	same, err := disk.Is(path, meta)
	if err != nil || same {
		return err
	}
	d.c.cfg.Log.Warn("the metadata image of a diff is damaged; it is written again from the index", "diff", d.id, "file", path)
	return durable.Replace(path, meta, 0o600)
}
