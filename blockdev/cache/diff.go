package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/durable"
)

// Errors of a Diff that is no more.
var (
	// ErrRemoved: the diff has been removed from the cache.
	ErrRemoved = errors.New("the diff was removed from the cache")
	// ErrClosed: the cache is closed.
	ErrClosed = errors.New("the cache is closed")
)

// Diff is one local diff. Its methods may be called from several goroutines.
type Diff struct {
	local
	flights *flights
	heads   headers

	proof    atomic.Int32 // a ProofState
	own      atomic.Pointer[ownTree]
	scrubbed *stamp
	track    atomic.Pointer[track] // of the Recording under way; nil: none
	hurries  atomic.Int32          // callers of Hurry that are not done

	prefetching chan struct{} // token: one prefetch at a time
	proving     chan struct{} // token: one proof at a time
}

// ID returns the DiffID.
func (d *Diff) ID() blockdev.Digest { return d.id }

// Size returns the length of the data file in bytes: DiffSize rounded up to a
// multiple of 4096. The bytes behind the diff are zero.
func (d *Diff) Size() int64 { return d.size }

// DiffSize returns the length of the diff in bytes.
func (d *Diff) DiffSize() int64 { return d.tab.Size }

// MetaPath returns the path of the EROFS metadata image that is to be mounted. A proof
// may change it, to another file of the same directory.
func (d *Diff) MetaPath() string {
	if d.own.Load() != nil {
		return d.path(ownMetaFile)
	}
	return d.path(metaFile)
}

// Completed reports whether the diff is complete, or is known to have been: then
// what is missing now has been damaged.
func (d *Diff) Completed() bool { return d.completed.Load() || d.Proof() == Proven }

// Index reads the whole index from disk again; a Diff keeps only what reads need. Its
// tree is the one that MetaPath shows.
func (d *Diff) Index() (*blockdev.Index, error) {
	ix, err := d.given()
	if own := d.own.Load(); err == nil && own != nil {
		var mine *blockdev.Index
		if mine, err = d.ownIndex(own.sum, index.Decode); err == nil {
			ix.Builder, ix.Meta, ix.Implied = mine.Builder, mine.Meta, mine.Implied
		}
	}
	return ix, err
}

// given is the index as it came.
func (d *Diff) given() (*blockdev.Index, error) {
	enc, err := d.encodedIndex()
	if err != nil {
		return nil, err
	}
	ix, err := d.c.cfg.decode(enc)
	if err != nil {
		return nil, fmt.Errorf("index of diff %v: %w", d.id, err)
	}
	return ix, nil
}

// Stat says how much of a diff is present.
type Stat struct {
	ID       blockdev.Digest
	Complete bool
	// Chunks and Bytes of the diff, and how many of these are present.
	Chunks, ChunksPresent int
	Bytes, BytesPresent   int64
	Proof                 ProofState
}

// Stat returns the state of the diff.
func (d *Diff) Stat() Stat {
	s := Stat{ID: d.id, Complete: d.Complete(), Chunks: d.tab.Len(), Bytes: d.tab.Size, Proof: d.Proof()}
	s.ChunksPresent, s.BytesPresent, _ = d.pres.Counts()
	return s
}

// writeDiff writes a new diff's files into dir and makes its index durable. The
// others can be made again from it, and are, should a power loss take them.
func writeDiff(dir string, enc []byte, ix *blockdev.Index, boot [16]byte) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	h := presence.HeaderOf(ix, blockdev.Sum(enc), boot)
	bitmap := make([]byte, presence.FileSize(len(ix.Chunks)))
	copy(bitmap, h.Encode())
	if err := disk.Write(filepath.Join(dir, bitmapFile), bitmap, false); err != nil {
		return err
	}
	if err := disk.Write(filepath.Join(dir, metaFile), ix.Meta, false); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, dataFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(roundUp(ix.DiffSize)), f.Close()); err != nil {
		return err
	}
	if err := disk.Write(filepath.Join(dir, indexFile), enc, true); err != nil {
		return err
	}
	return durable.SyncDir(dir)
}

// stop ends all flights and prefetches of the diff with why, and returns when
// they are over. Reads that are waiting end with why at once.
func (d *Diff) stop(why error) {
	d.flights.stop(why)
	// Wait for the sync under way; there will be no other.
	d.syncing <- struct{}{}
	d.stopped = why
	<-d.syncing
}

// FullUse is what the diff takes of the disk once it is complete, in bytes and
// inodes.
func (d *Diff) FullUse() (bytes, inodes int64, err error) {
	fixed, err := d.fixedUse()
	if err != nil {
		return 0, 0, err
	}
	// The header stream comes last.
	var st unix.Stat_t
	if err := unix.Lstat(d.path(headersFile), &st); err != nil && !errors.Is(err, unix.ENOENT) {
		return 0, 0, &os.PathError{Op: "stat", Path: d.path(headersFile), Err: err}
	}
	fixed += max(0, roundUp(d.heads.starts[len(d.heads.pieces)])-st.Blocks*512)
	// Its directory, data, index, metadata, bitmap, headers, and the records of a
	// proof and of a scrub.
	return fixed + d.size, 8, nil
}
