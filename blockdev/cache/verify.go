package cache

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/internal/durable"
)

// Verify checks the files of a diff that is in use: index, metadata image and
// bitmap against what is known, and every chunk that is here against its digest.
// What is damaged of the chunks is missing from then on, as with any read. With
// repair the other files are written again where that can be done.
func (d *Diff) Verify(ctx context.Context, repair bool) (*Inspection, error) {
	in := &Inspection{Diffs: 1}
	where := "layer " + d.id.String()
	complete := d.Complete()
	res, err := d.Check(ctx, true)
	in.Chunks, in.Bytes, in.DamagedChunks = res.Chunks, res.Bytes, res.Damaged
	if errors.Is(err, ErrDamaged) {
		in.add(where, repairChunks, "%v", err)
	} else if errors.Is(err, ErrIncomplete) {
		// Found before, and not fetched again yet.
		in.DamagedChunks = res.Missing
		in.add(where, repairChunks, "%v", err)
	} else if err != nil {
		return nil, err
	} else if complete {
		in.Complete = 1
	}
	switch d.Proof() {
	case Proven:
		in.Proven = 1
	case Quarantined:
		in.add(where, "", "%v", d.Distrust())
	case Unproven:
	}
	ix, err := d.Index()
	if err != nil {
		in.add(where, "", "%v: remove the images that have it and pull them again, or restart the node, which fetches it again", err)
		return in, nil
	}
	path := d.MetaPath()
	if same, err := disk.Is(path, ix.Meta); err != nil {
		return nil, err
	} else if !same {
		done := ""
		if repair {
			if err := durable.Replace(path, ix.Meta, 0o600); err != nil {
				return nil, err
			}
			done = repairMeta
		}
		in.add(where, done, "metadata image does not match its index (containers that have it mounted may read wrong names and sizes: restart them)")
	}
	return in, d.verifyBitmap(in, where, repair)
}

// verifyBitmap looks at the file after it has been brought up to date.
func (d *Diff) verifyBitmap(in *Inspection, where string, repair bool) error {
	var bad error
	for range 3 { // a record that is just being written may be seen half
		if err := d.pres.Persist(d.bitmap, true); err != nil {
			return err
		}
		b := make([]byte, presence.FileSize(d.tab.Len()))
		if _, err := d.bitmap.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if _, bad = presence.Read(b, d.header(false)); bad == nil {
			if n := presence.Damaged(d.id, b[presence.HeaderSize:]); n > 0 {
				bad = fmt.Errorf("%d records do not match their checksums: %w", n, blockdev.ErrCorrupt)
			}
		}
		if bad == nil {
			return nil
		}
	}
	done := ""
	if repair {
		d.pres.Soil()
		if err := errors.Join(d.pres.Persist(d.bitmap, true), disk.Sync(d.bitmap), d.writeHeader(d.complete.Load())); err != nil {
			return err
		}
		done = "written again from memory"
	}
	in.add(where, done, "bitmap: %v", bad)
	return nil
}
