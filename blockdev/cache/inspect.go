package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/blockdev/cache/internal/table"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/proof"
)

// What a repair does about it.
const (
	repairDiff   = "removed; its index and bytes are fetched again when they are needed"
	repairMeta   = "written again from the index"
	repairBitmap = "made again: every chunk is checked before it is used"
	repairChunks = "dropped; they are fetched again"
	repairProof  = "quarantined"
	repairOwn    = "left alone: the one that came is used until the layer is proven again"
	repairFile   = "removed"
)

// Inspection is what Inspect has looked at and found.
type Inspection struct {
	// Diffs of which Proven are what their DiffIDs say, shown just now, and Complete
	// have all bytes.
	Diffs, Complete, Proven int
	// Chunks and Bytes that were read and checked.
	Chunks, DamagedChunks int
	Bytes                 int64
	// Damaged are the diffs that were found so.
	Damaged  []blockdev.Digest
	Findings []blockdev.Finding
}

func (in *Inspection) add(where, repaired, format string, args ...any) {
	in.Findings = append(in.Findings, blockdev.Finding{Where: where, Problem: fmt.Sprintf(format, args...), Repaired: repaired})
}

// Inspect reads and checks all local diffs below root while no Cache has it open;
// if one has, the error wraps ErrInUse. Nothing is changed, and every Finding
// says in Repaired what Repair would do.
func Inspect(ctx context.Context, root string) (*Inspection, error) {
	lock, err := disk.Lock(filepath.Join(root, lockFile))
	if err != nil {
		return nil, fmt.Errorf("check %s: %w", root, err)
	}
	defer lock.Close()
	boot, err := disk.BootID()
	if err != nil {
		return nil, fmt.Errorf("check %s: %w", root, err)
	}
	in := &Inspection{}
	dirs, err := os.ReadDir(filepath.Join(root, diffsDir))
	if err != nil {
		return nil, fmt.Errorf("check %s: %w", root, err)
	}
	q, err := openQuarantine(filepath.Join(root, quarantineDir), slog.New(slog.DiscardHandler))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("check %s: %w", root, err)
	}
	for _, e := range dirs {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("check %s: %w", root, context.Cause(ctx))
		}
		dir := filepath.Join(root, diffsDir, e.Name())
		id, ok := blockdev.ParseHex(e.Name())
		if !ok {
			in.add(dir, "", "this is not a diff: find out what it is, and move it away")
			continue
		}
		i := &inspector{folder: folder{dir, id}, in: in, q: q, boot: presence.HashBoot(boot)}
		before := len(in.Findings)
		if err := i.run(ctx); err != nil {
			return nil, fmt.Errorf("check diff %v: %w", id, err)
		}
		in.Diffs++
		if len(in.Findings) > before {
			in.Damaged = append(in.Damaged, id)
		}
	}
	return in, in.tmp(root)
}

// tmp finds what a crash has left half-done.
func (in *Inspection) tmp(root string) error {
	left, err := os.ReadDir(filepath.Join(root, tmpDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range left {
		in.add(filepath.Join(root, tmpDir, e.Name()), repairFile, "left over from adding or removing a layer")
	}
	return nil
}

// inspector looks at one diff.
type inspector struct {
	folder
	in *Inspection
	q  *quarantine
	// boot that the kernel runs. What another one has not synced nobody believes.
	boot [16]byte

	ix   *blockdev.Index
	own  *blockdev.Index // whose tree is shown in place of that of ix; nil: none
	tab  *table.Table
	data *os.File
	pres *presence.Chunks // what the bitmap says
}

func (i *inspector) where() string { return "layer " + i.id.String() }

func (i *inspector) run(ctx context.Context) error {
	var sum blockdev.Digest
	var err error
	i.ix, sum, i.tab, err = i.index(index.Decode)
	if err != nil {
		i.in.add(i.where(), repairDiff, "%v", err)
		return nil
	}
	if same, err := disk.Is(i.path(metaFile), i.ix.Meta); err != nil {
		return err
	} else if !same {
		i.in.add(i.where(), repairMeta, "metadata image does not match its index")
	}
	if err := i.ownTree(); err != nil {
		return err
	}
	complete, err := i.bitmap(sum)
	if err != nil {
		return err
	}
	i.data, err = os.Open(i.path(dataFile))
	if errors.Is(err, fs.ErrNotExist) {
		i.in.add(i.where(), repairBitmap, "data file is missing")
		return nil
	}
	if err != nil {
		return err
	}
	defer i.data.Close()
	damaged, err := i.chunks(ctx)
	if err != nil {
		return err
	}
	if i.q != nil && i.q.has(i.id, sum) {
		i.in.add(i.where(), "", "quarantined: %v", i.q.m[i.id].Cause)
		return nil
	}
	if complete && damaged == 0 {
		i.in.Complete++
		return i.prove(ctx)
	}
	return nil
}

// bitmap reads what is said to be there. What cannot be believed is not looked at:
// nobody else believes it.
func (i *inspector) bitmap(sum blockdev.Digest) (complete bool, err error) {
	b, err := os.ReadFile(i.path(bitmapFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	h, err := presence.Read(b, presence.HeaderOf(i.ix, sum, i.boot))
	n := i.tab.Len()
	p := presence.New(i.id, n, i.tab.Length)
	i.pres = p
	if err != nil {
		i.in.add(i.where(), repairBitmap, "%v", err)
		return false, nil
	}
	bad := presence.Damaged(i.id, b[presence.HeaderSize:])
	if bad > 0 {
		i.in.add(i.where(), repairBitmap, "bitmap: %d records do not match their checksums", bad)
	}
	believed := presence.BelieveSynced
	if h.Boot == i.boot {
		believed = presence.BelievePresent
	}
	p.Load(b[presence.HeaderSize:], believed)
	return h.Complete && bad == 0 && p.SyncedAll(0, n), nil
}

// chunks reads what is present.
func (i *inspector) chunks(ctx context.Context) (damaged int, err error) {
	buf := make([]byte, blockdev.MaxChunk)
	first, seen := -1, 0
	for k := range i.tab.Len() {
		if !i.pres.Has(k) {
			continue
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		b := buf[:i.tab.Length(k)]
		n, err := i.data.ReadAt(b, i.tab.Start(k))
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.EIO) {
			return 0, err
		}
		seen++
		i.in.Chunks++
		i.in.Bytes += int64(n)
		if err != nil || !i.tab.Check(k, b) {
			if damaged++; first < 0 {
				first = k
			}
		}
		if seen%64 == 0 {
			disk.Drop(i.data, 0, i.tab.Start(k))
		}
	}
	disk.Drop(i.data, 0, 0)
	i.in.DamagedChunks += damaged
	if damaged > 0 {
		i.in.add(i.where(), repairChunks, "%d of %d chunks do not match their digests, the first at offset %d", damaged, seen, i.tab.Start(first))
	}
	return damaged, nil
}

// prove compares a complete diff with its DiffID, if its header stream is here.
func (i *inspector) prove(ctx context.Context) error {
	heads := newHeaders(i.ix)
	var f *os.File
	if len(heads.pieces) > 0 {
		var err error
		if f, err = os.Open(i.path(headersFile)); errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		defer f.Close()
	}
	buf := make([]byte, blockdev.MaxChunk)
	next := 0
	own, err := proof.Run(ctx, i.ix, i.data, func(context.Context, blockdev.Piece) ([]byte, error) {
		k := next
		next++
		b, ok := heads.piece(f, k, buf)
		if !ok {
			return nil, ErrIncomplete
		}
		return b, nil
	})
	disk.Drop(i.data, 0, 0)
	switch {
	case err == nil && (own == nil || i.shows(own)):
		i.in.Proven++
	case err == nil: // the node takes this tree over when it proves the layer
	case errors.Is(err, proof.ErrMismatch):
		i.in.add(i.where(), repairProof, "all bytes are here, and they do not match the index: %v", err)
	case errors.Is(err, ErrIncomplete):
		// Pieces are fetched again when they are needed.
	default:
		return err
	}
	return nil
}

// ownTree reads the tree that the diff shows in place of the given one, if there is one.
func (i *inspector) ownTree() error {
	rec, err := i.proof()
	if err != nil || rec.Own == (blockdev.Digest{}) {
		return nil // without a record that is right, the given one is shown
	}
	if i.own, err = i.ownIndex(rec.Own, index.Decode); err != nil {
		i.in.add(i.where(), repairOwn, "the index that this node made of the layer: %v", err)
		return nil
	}
	if same, err := disk.Is(i.path(ownMetaFile), i.own.Meta); err != nil {
		return err
	} else if !same {
		i.in.add(i.where(), repairMeta, "metadata image does not match the index that this node made")
	}
	return nil
}

// shows says whether the tree that the diff shows is that of ix, and not the given one.
func (i *inspector) shows(ix *blockdev.Index) bool {
	return i.own != nil && bytes.Equal(i.own.Meta, ix.Meta) && slices.Equal(i.own.Implied, ix.Implied)
}

// noSource is for a Cache that is opened to be repaired.
type noSource struct{}

func (noSource) Fetch(context.Context, blockdev.Request, blockdev.Deliver) error {
	return blockdev.ErrUnavailable
}

// Repair does what Inspect has said. The Inspection that it returns is of what is
// there afterwards of the damaged diffs alone.
func Repair(ctx context.Context, root string, damaged []blockdev.Digest, log *slog.Logger) (*Inspection, error) {
	c, err := Open(ctx, Config{Root: root, Source: noSource{}, Log: log})
	if err != nil {
		return nil, err
	}
	err = c.repair(ctx, damaged)
	if err := errors.Join(err, c.Close()); err != nil {
		return nil, err
	}
	after := &Inspection{}
	for _, id := range damaged {
		dir := filepath.Join(root, diffsDir, id.Hex())
		if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		i := &inspector{folder: folder{dir, id}, in: after, boot: c.boot}
		if err := i.run(ctx); err != nil {
			return nil, err
		}
	}
	return after, after.tmp(root)
}

func (c *Cache) repair(ctx context.Context, damaged []blockdev.Digest) error {
	select {
	case <-c.swept: // and every diff is open
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for _, id := range damaged {
		d, ok := c.Get(id)
		if !ok {
			continue
		}
		if _, err := d.Check(ctx, true); err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrIncomplete) {
			return err
		}
		if d.Complete() && d.Proof() == Unproven {
			// Without a Source it may be that this cannot be told.
			if err := d.Prove(ctx, true); ctx.Err() != nil {
				return err
			}
		}
	}
	return nil
}
