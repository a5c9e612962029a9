package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/prefetch"
	"github.com/shoalfs/shoal/blockdev/proof"
)

// ProofState says what is known of a diff's index.
type ProofState uint8

// The zero ProofState is Unproven.
const (
	// Unproven: the index is believed as it came.
	Unproven ProofState = iota
	// Proven: the tar that the diff and its header stream give has the DiffID, and
	// gives this index.
	Proven
	// Quarantined: it does not.
	Quarantined
)

func (s ProofState) String() string {
	return [...]string{"unproven", "proven", "quarantined", "unproven"}[s&3]
}

// Proof returns the state of the diff's proof. It survives a restart, and the
// eviction of bytes: what is fetched again is checked against the proven index.
func (d *Diff) Proof() ProofState { return ProofState(d.proof.Load()) }

// Distrust returns nil, or an error that wraps blockdev.ErrQuarantined and tells
// the operator what happened and how to go on.
func (d *Diff) Distrust() error {
	if d.Proof() != Quarantined {
		return nil
	}
	return d.c.quarantine.why(d.id)
}

// Prove proves the index of a complete diff, unless that has been done. It reads
// every byte, checking it against its digest, fetches what is missing of the
// header stream, waits for demand reads, and, but with hurry or while there is a
// Hurry, rests for as long as it has worked. The error wraps ErrIncomplete or ErrDamaged;
// blockdev.ErrQuarantined if the index is wrong, which is on record then; or it is
// that of the Source, the disk or ctx, and a later call may do better.
func (d *Diff) Prove(ctx context.Context, hurry bool) error {
	ctx, leave, err := d.flights.enter(ctx)
	if err != nil {
		return fmt.Errorf("proof of diff %v: %w", d.id, err)
	}
	defer leave()
	select {
	case d.proving <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("proof of diff %v: %w", d.id, context.Cause(ctx))
	}
	defer func() { <-d.proving }()

	switch d.Proof() {
	case Proven:
		return nil
	case Quarantined:
		return d.Distrust()
	}
	own, err := d.prove(ctx, hurry)
	if errors.Is(err, proof.ErrMismatch) {
		// What was read had its digests, so it is the index that is wrong, or memory
		// that flips bits. Again, before anybody is accused.
		own, err = d.prove(ctx, hurry)
	}
	switch {
	case err == nil:
		var sum blockdev.Digest
		if own != nil {
			if sum, err = d.takeOver(ctx, own); err != nil {
				return fmt.Errorf("diff %v has another tree than its index says, and the node cannot record that: %w", d.id, err)
			}
		}
		if err := d.c.quarantine.putProven(d.folder, d.sum, sum); err != nil {
			return fmt.Errorf("diff %v is proven, but the node cannot record that: %w", d.id, d.c.room.Failed(d.id, err))
		}
		if own != nil {
			d.own.Store(&ownTree{sum: sum})
			d.c.cfg.Log.Warn("the index of a layer was made by another version of shoal, and this node's version makes another tree of the layer; "+
				"containers that start from now on read this node's tree, and running containers keep the tree that they have", "diff", d.id, "builder", own.Builder)
		}
		d.proof.Store(int32(Proven))
		d.c.stats.proven.Add(1)
		d.scrubbed.now() // every chunk was looked at
		return nil
	case errors.Is(err, proof.ErrMismatch):
		return d.distrust(err)
	default:
		return fmt.Errorf("proof of diff %v: %w", d.id, err)
	}
}

// distrust puts the index under quarantine.
func (d *Diff) distrust(cause error) error {
	werr := d.c.quarantine.add(d.id, d.sum, cause)
	d.proof.Store(int32(Quarantined))
	d.c.stats.quarantined.Add(1)
	err := d.Distrust()
	d.c.cfg.Log.Error("the content of a layer does not match its index; the index is quarantined", "diff", d.id, "error", err)
	if werr != nil {
		d.c.cfg.Log.Error("cannot record that an index is quarantined; after a restart the node must find the fault again", "diff", d.id, "error", werr)
	}
	d.c.cfg.Distrusted(d.id, err)
	return err
}

// prove returns the index whose tree is to be shown, if it is not the given one's.
func (d *Diff) prove(ctx context.Context, hurry bool) (*blockdev.Index, error) {
	if !d.complete.Load() {
		return nil, ErrIncomplete
	}
	ix, err := d.given()
	if err != nil {
		return nil, err
	}
	f, err := d.openHeaders(os.O_RDWR | os.O_CREATE)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := d.heads.fetch(ctx, &d.local, f); err != nil {
		return nil, err
	}
	r := d.newVerified(ctx, hurry)
	defer r.close()
	buf := d.c.buffer()
	defer d.c.buffers.Put(buf)
	next := 0
	own, err := proof.Run(ctx, ix, r, func(context.Context, blockdev.Piece) ([]byte, error) {
		i := next // pieces are asked for in their order, each once
		next++
		if i >= len(d.heads.pieces) {
			return nil, fmt.Errorf("piece %d of the header stream: %w", i, blockdev.ErrNotFound)
		}
		b, ok := d.heads.piece(f, i, buf[:])
		if !ok {
			return nil, fmt.Errorf("piece %d of the header stream has changed on disk: %w", i, ErrDamaged)
		}
		return b, nil
	})
	disk.Drop(f, 0, 0)
	return own, err
}

// verified reads a diff chunk by chunk, in order, and returns only what has its
// digest. It is for one goroutine.
type verified struct {
	d     *Diff
	ctx   context.Context // of one pass over the diff
	rest  *prefetch.Rest
	buf   chunkBuffer
	chunk int // in buf; -1: none
}

func (d *Diff) newVerified(ctx context.Context, hurry bool) *verified {
	inHurry := func() bool { return hurry || d.hurries.Load() > 0 } // a caller may come while it runs
	return &verified{d: d, ctx: ctx, rest: prefetch.NewRest(&d.c.pace.Gate, inHurry, 0), buf: d.c.buffer(), chunk: -1}
}

func (v *verified) close() { v.d.c.buffers.Put(v.buf) }

// ReadAt implements io.ReaderAt over the masked diff.
func (v *verified) ReadAt(p []byte, off int64) (n int, err error) {
	d := v.d
	for n < len(p) {
		if off >= d.tab.Size {
			return n, io.EOF
		}
		i := v.chunk
		if i < 0 || off < d.tab.Start(i) || off >= d.tab.Start(i+1) {
			i = d.tab.At(off)
			if err := v.load(i); err != nil {
				return n, err
			}
		}
		m := copy(p[n:], v.buf[off-d.tab.Start(i):d.tab.Length(i)])
		n += m
		off += int64(m)
	}
	return n, nil
}

func (v *verified) load(i int) error {
	v.chunk = -1
	if err := v.rest.Wait(v.ctx, v.d.tab.Length(i)); err != nil {
		return err
	}
	if err := v.d.verify(i, v.buf[:v.d.tab.Length(i)]); err != nil {
		if errors.Is(err, os.ErrClosed) {
			err = v.d.flights.why()
		}
		return fmt.Errorf("chunk %d: %w", i, err)
	}
	v.chunk = i
	return nil
}
