package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/prefetch"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
	"github.com/shoalfs/shoal/blockdev/cache/internal/table"
	"github.com/shoalfs/shoal/internal/durable"
)

// Errors of a Diff that is no more.
var (
	// ErrRemoved: the diff has been removed from the cache.
	ErrRemoved = errors.New("the diff was removed from the cache")
	// ErrClosed: the cache is closed.
	ErrClosed = errors.New("the cache is closed")
)

const (
	indexFile  = "index"
	metaFile   = "meta"
	dataFile   = "data"
	bitmapFile = "bitmap"

	// dataAlign is what the data file's length is a multiple of, as a loop
	// device or a block device would have it.
	dataAlign = 4096
)

// Diff is one local diff. Its methods may be called from several goroutines.
type Diff struct {
	c    *Cache
	id   blockdev.Digest
	sum  blockdev.Digest // of the encoded index
	dir  string
	tab  *table.Table
	pres *presence.Chunks
	size int64 // of the data file

	heads headers

	data, bitmap *os.File
	complete     atomic.Bool
	completed    atomic.Bool  // complete now, or was before
	proof        atomic.Int32 // a ProofState
	own          atomic.Pointer[ownTree]
	scrubbed     atomic.Int64 // Unix nanoseconds
	bitmapBad    atomic.Bool  // logged that the bitmap cannot be written

	track atomic.Pointer[track] // of the Recording under way; nil: none
	keep  atomic.Int64          // Unix nanoseconds until when a sync leaves pages in the page cache

	hurries atomic.Int32 // Hurry

	syncing     chan struct{} // token: one sync at a time
	prefetching chan struct{} // token: one prefetch at a time
	proving     chan struct{} // token: one proof at a time

	// life ends with Remove or Close. It is kept here because flights belong to
	// the diff and to no caller.
	life context.Context
	kill context.CancelCauseFunc
	wg   sync.WaitGroup // groups and prefetches; counted up under mu

	mu      sync.Mutex
	gone    error // why there will be no more flights
	flights map[int]*flight
	seq     prefetch.Sequences

	share   room.Share     // of the disk
	reading prefetch.Reads // guarded by Cache.gate
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

// DataPath returns the path of the data file. Only when Complete is true does it
// have all bytes, and may be read by other means than this package.
func (d *Diff) DataPath() string { return filepath.Join(d.dir, dataFile) }

// Complete reports whether every chunk is present, was checked and is on stable
// storage. It turns false again only if a chunk is found damaged on disk.
func (d *Diff) Complete() bool { return d.complete.Load() }

// Completed reports whether the diff is complete, or is known to have been: then
// what is missing now has been damaged.
func (d *Diff) Completed() bool { return d.completed.Load() || d.Proof() == Proven }

// setComplete says that the diff is complete.
func (d *Diff) setComplete() {
	d.complete.Store(true)
	d.completed.Store(true)
}

// Index reads the whole index from disk again; a Diff keeps only what reads need. Its
// tree is the one that MetaPath shows.
func (d *Diff) Index() (*blockdev.Index, error) {
	ix, err := d.given()
	if own := d.own.Load(); err == nil && own != nil {
		var mine *blockdev.Index
		if mine, err = d.readOwn(own.sum); err == nil {
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

// encodedIndex reads the index as it came.
func (d *Diff) encodedIndex() ([]byte, error) {
	enc, err := os.ReadFile(filepath.Join(d.dir, indexFile))
	if err != nil {
		return nil, fmt.Errorf("index of diff %v: %w", d.id, err)
	}
	if blockdev.Sum(enc) != d.sum {
		return nil, fmt.Errorf("index of diff %v has changed on disk since it was opened: %w", d.id, blockdev.ErrCorrupt)
	}
	return enc, nil
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

func roundUp(n int64) int64 { return (n + dataAlign - 1) &^ (dataAlign - 1) }

// openDiff opens the diff in dir. An error that wraps ErrCorrupt means that it
// cannot be used and should be dropped.
func (c *Cache) openDiff(dir string, id blockdev.Digest) (*Diff, error) {
	enc, err := readIndex(filepath.Join(dir, indexFile))
	if err != nil {
		return nil, err
	}
	ix, done, err := c.decode(c.life, enc)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	d, err := c.openDecoded(dir, id, blockdev.Sum(enc), ix)
	done() // the proof may need memory for an index of its own
	if err != nil {
		return nil, err
	}
	if err := d.loadProof(); err != nil {
		return nil, errors.Join(err, d.closeFiles())
	}
	return d, nil
}

func (c *Cache) openDecoded(dir string, id, sum blockdev.Digest, ix *blockdev.Index) (*Diff, error) {
	if ix.DiffID != id {
		return nil, fmt.Errorf("index is that of diff %v: %w", ix.DiffID, blockdev.ErrCorrupt)
	}
	tab, err := table.New(ix)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	return c.newDiff(dir, sum, ix, tab)
}

// newDiff opens the files of a diff whose index has been read.
func (c *Cache) newDiff(dir string, sum blockdev.Digest, ix *blockdev.Index, tab *table.Table) (*Diff, error) {
	d := &Diff{
		c: c, id: ix.DiffID, sum: sum, dir: dir,
		tab: tab, pres: presence.New(ix.DiffID, tab.Len(), tab.Length), size: roundUp(tab.Size), heads: newHeaders(ix),
		syncing: make(chan struct{}, 1), prefetching: make(chan struct{}, 1), proving: make(chan struct{}, 1),
		flights: make(map[int]*flight),
	}
	d.share.Measure = d.use
	err := d.openFiles(ix)
	if err == nil {
		err = c.room.Enter(&d.share)
	}
	if err != nil {
		for _, f := range []*os.File{d.data, d.bitmap} {
			if f != nil {
				_ = f.Close() // the first error is the one that tells
			}
		}
		return nil, err
	}
	d.loadScrub()
	d.life, d.kill = context.WithCancelCause(context.Background())
	return d, nil
}

// readIndex reads an index file. One that is missing or empty is a diff that a
// power loss has cut short.
func readIndex(path string) ([]byte, error) {
	enc, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(enc) == 0 {
		return nil, fmt.Errorf("index is missing: %w", blockdev.ErrCorrupt)
	}
	return enc, err
}

func (d *Diff) openFiles(ix *blockdev.Index) error {
	err := d.fixMeta(d.path(metaFile), ix.Meta)
	if err != nil {
		return err
	}
	if d.data, err = os.OpenFile(d.DataPath(), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if d.bitmap, err = os.OpenFile(filepath.Join(d.dir, bitmapFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	return d.loadBitmap(ix)
}

// loadBitmap finds out which chunks are present. What of the file is not
// believed is suspect, and the file says so before it says that it belongs to
// this boot.
func (d *Diff) loadBitmap(ix *blockdev.Index) error {
	b := make([]byte, presence.FileSize(d.tab.Len())+1)
	n, err := io.ReadFull(d.bitmap, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	want := presence.HeaderOf(ix, d.sum, d.c.boot)
	h, err := presence.DecodeHeader(b[:n])
	switch {
	case err == nil && h.DiffID == want.DiffID && h.Index != want.Index:
		return fmt.Errorf("index is not the one that the bitmap was made for: %w", blockdev.ErrCorrupt)
	case err == nil && h.DiffID != want.DiffID:
		err = fmt.Errorf("bitmap is that of diff %v: %w", h.DiffID, blockdev.ErrCorrupt)
	case err == nil && (h.Chunks != want.Chunks || h.DiffSize != want.DiffSize || int64(n) != presence.FileSize(d.tab.Len())):
		err = fmt.Errorf("bitmap is of another size: %w", blockdev.ErrCorrupt)
	}
	size, serr := d.fixSize()
	if serr != nil {
		return serr
	}
	if err == nil && size != d.size {
		err = fmt.Errorf("data file has %d bytes, want %d: %w", size, d.size, blockdev.ErrCorrupt)
	}
	if err != nil {
		d.c.cfg.Log.Warn("cannot tell which chunks of a diff are on disk; each chunk is checked before it is used", "diff", d.id, "dir", d.dir, "cause", err)
		d.pres.DoubtAll()
		h = presence.Header{}
		// What is checked must be what the disk has, so that the next sync means
		// something.
		if err := disk.Sync(d.data); err != nil {
			return err
		}
		disk.Drop(d.data, 0, 0)
		// No good record may survive under the new header.
		if err := d.bitmap.Truncate(0); err != nil {
			return err
		}
		if _, err := d.bitmap.WriteAt(make([]byte, presence.FileSize(d.tab.Len())), 0); err != nil {
			return err
		}
	} else if doubted := d.pres.Load(b[presence.HeaderSize:], d.believe(&h)); doubted > 0 {
		d.c.cfg.Log.Info("some chunks of a diff may be wrong since the last boot, or have damaged records; they are checked before they are used", "diff", d.id, "chunks", doubted)
	}
	if h.Boot != d.c.boot && d.c.unclean {
		d.forgetScrub()
	}
	// What complete promises about an old process' chunks holds for all or none.
	complete := h.Complete && d.pres.SyncedAll(0, d.tab.Len())
	d.completed.Store(h.Complete)
	if h.Boot == d.c.boot && complete == h.Complete {
		if complete {
			d.setComplete()
		}
		return d.pres.Persist(d.bitmap, true)
	}
	if err := d.pres.Persist(d.bitmap, true); err != nil {
		return err
	}
	if err := disk.Sync(d.bitmap); err != nil {
		return err
	}
	if err := d.writeHeader(complete); err != nil {
		return err
	}
	if complete {
		d.setComplete()
	}
	return nil
}

// believe says what of a bitmap whose header checks out is believed. After a
// machine that went down while the cache was open, nothing is that costs little to
// check on its first use. A complete diff is mounted natively, and read by nobody
// but the kernel: what was synced is believed there, and scrubbed soon.
func (d *Diff) believe(h *presence.Header) presence.Belief {
	switch {
	case h.Boot == d.c.boot:
		return presence.BelievePresent
	case d.c.unclean && !h.Complete:
		return presence.BelieveNone
	default:
		return presence.BelieveSynced
	}
}

// fixSize gives the data file its length, and returns the one it had.
func (d *Diff) fixSize() (int64, error) {
	var st unix.Stat_t
	if err := disk.Control(d.data, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, &os.PathError{Op: "stat", Path: d.DataPath(), Err: err}
	}
	if st.Size == d.size {
		return st.Size, nil
	}
	// What lies behind the diff must be zero, so it is cut off there first.
	if st.Size > d.tab.Size {
		if err := d.data.Truncate(d.tab.Size); err != nil {
			return 0, err
		}
	}
	return st.Size, d.data.Truncate(d.size)
}

func (d *Diff) writeHeader(complete bool) error {
	h := presence.Header{
		Complete: complete, DiffID: d.id, Index: d.sum, Boot: d.c.boot,
		DiffSize: d.tab.Size, Chunks: uint32(d.tab.Len()),
	}
	_, err := d.bitmap.WriteAt(h.Encode(), 0)
	return err
}

// enter counts the caller in, for wg.Done to count it out; it fails when the diff
// is no more.
func (d *Diff) enter() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone != nil {
		return d.gone
	}
	d.wg.Add(1)
	return nil
}

func (d *Diff) goneErr() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone != nil {
		return d.gone
	}
	return os.ErrClosed
}

// stop ends all flights and prefetches of the diff with why, and returns when
// they are over. Reads that are waiting end with why at once.
func (d *Diff) stop(why error) {
	d.mu.Lock()
	if d.gone == nil {
		d.gone = why
	}
	d.mu.Unlock()
	d.kill(why)
	d.wg.Wait()
	// Wait for the sync under way; there will be no other.
	d.syncing <- struct{}{}
	<-d.syncing
}

func (d *Diff) closeFiles() error {
	return errors.Join(d.data.Close(), d.bitmap.Close())
}
