package cache

import (
	"context"
	"errors"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/durable"
)

// A diff whose index another version of the builder has made may get a tree of its
// own when it is proven: the one that this node makes. It lies beside the given one,
// since mounts of that are in use, and since the given index is what other nodes are
// given: their reader knows its SHA-256.
// ownTree is the tree that a diff shows in place of the one that its index came with.
type ownTree struct {
	sum blockdev.Digest // of the file index.own
}

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
