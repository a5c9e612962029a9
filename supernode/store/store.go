package store

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
)

// ErrClosed is returned by every call after Close.
var ErrClosed = errors.New("store is closed")

// Config says where a store is and how much it may hold.
type Config struct {
	// Dir is made if it is not there. One process at a time may have it open.
	Dir string
	// Quota is in bytes of disk space; 0 or less: what the file system has.
	Quota int64
	// QuotaKey is how the user calls Quota, for error texts. Default
	// "store.quota".
	QuotaKey string
	// Log gets what an operator should know: damage, evictions. Default: nothing.
	Log *slog.Logger
	// TouchInterval is how often last uses are written down, so how much of
	// their order a crash forgets. Default 10 minutes.
	TouchInterval time.Duration
	// Idle is how long after the end of the last ingest the store begins to
	// compress what ingests have stored raw; a tenth of it after the last call of
	// Chunk. Default 10 seconds; negative: never.
	Idle time.Duration
	// Thorough has Open read all of index.db also after a clean end, which takes as long
	// as the store is large.
	Thorough bool
	// Yield is called when there is no room and all diffs are pinned: it gives one pin
	// back, or says false. Nil: there is none to be had.
	Yield func() bool

	// For tests: the size of a step and of a run, and what is called at points
	// of a run.
	stepBytes, runBytes int64
	batch               int
	hook                func(point string)
}

// diskMargin is left free on the file system, so that there is always room for
// the transaction that frees some.
const diskMargin = 32 << 20

// Store is an open store. All methods may be called from any goroutine.
type Store struct {
	cfg   Config
	quota int64
	db    *bolt.DB
	packs *packs
	comp  *compressor
	// evicting is held (by sending) by the one who looks for room.
	evicting chan struct{}
	damage   damageQueue
	// commit serialises publishing and removing, which change index.db and the
	// maps below together. Those who read, or put chunks, never take it.
	commit sync.Mutex

	// mu guards what follows. It is never held across I/O.
	mu       sync.Mutex
	now      func() time.Time // of uses; tests give their own
	lastUse  int64            // Unix nanoseconds; see useLocked
	diffs    map[blockdev.Digest]*diffState
	layers   map[blockdev.Digest]layerRecord
	pins     map[blockdev.Digest]int // diffs in use
	holds    map[blockdev.Digest]int // chunks that running ingests count on
	doomed   map[blockdev.Digest]int // chunks that a running transaction deletes
	orphans  map[blockdev.Digest]struct{}
	sessions map[*Ingest]struct{}
	packUse  map[uint64]int64 // bytes on disk
	nextPack uint64
	used     int64 // bytes: packs, index.db, reservations of ingests
	dbUse    int64 // bytes: the part of used that is index.db
	punched  []extent
	closed   bool
	stats    counters
	due      int64     // raw bytes of chunks that are still to be compressed
	ingested time.Time // when the last ingest ended, or Open

	doubtful atomic.Bool // index.db has shown damage

	served atomic.Int64  // when the last call of Chunk was, in Unix nanoseconds
	wake   chan struct{} // recompress is to look again

	stop chan struct{}
	wg   sync.WaitGroup
}

// diffState is what is known in memory about a published diff.
type diffState struct {
	used   int64 // Unix nanoseconds of the last use
	dirty  bool  // used is newer than on disk
	layers []blockdev.Digest
}

// Open opens the store in cfg.Dir, makes one if there is none, and removes what
// a crash has left half-done. Errors wrap blockdev.ErrUnsupported (the
// directory was written by a newer version) or blockdev.ErrNoSpace. A damaged
// index.db is logged and the store starts empty: it is a cache.
func Open(cfg Config) (*Store, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.QuotaKey == "" {
		cfg.QuotaKey = "store.quota"
	}
	if cfg.TouchInterval <= 0 {
		cfg.TouchInterval = 10 * time.Minute
	}
	if cfg.Idle == 0 {
		cfg.Idle = defaultIdle
	}
	if cfg.stepBytes == 0 {
		cfg.stepBytes, cfg.runBytes = stepBytes, runBytes
	}
	if cfg.batch == 0 {
		cfg.batch = batchChunks
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	p, err := newPacks(filepath.Join(cfg.Dir, "packs"))
	if err != nil {
		return nil, err
	}
	if err := canPunch(p.dir); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	comp, err := newCompressor()
	if err != nil {
		return nil, err
	}
	s := &Store{
		cfg:      cfg,
		packs:    p,
		comp:     comp,
		evicting: make(chan struct{}, 1),
		diffs:    make(map[blockdev.Digest]*diffState),
		layers:   make(map[blockdev.Digest]layerRecord),
		pins:     make(map[blockdev.Digest]int),
		holds:    make(map[blockdev.Digest]int),
		doomed:   make(map[blockdev.Digest]int),
		orphans:  make(map[blockdev.Digest]struct{}),
		sessions: make(map[*Ingest]struct{}),
		packUse:  make(map[uint64]int64),
		stop:     make(chan struct{}),
		wake:     make(chan struct{}, 1),
		ingested: time.Now(),
		now:      time.Now,
	}
	if err := s.openDB(); err != nil {
		return nil, errors.Join(err, comp.close())
	}
	if err := s.load(); err != nil {
		return nil, errors.Join(err, s.db.Close(), p.close(), comp.close())
	}
	s.wg.Go(s.writeUses)
	if cfg.Idle > 0 {
		s.wg.Go(s.recompress)
	}
	return s, nil
}

func (s *Store) dbPath() string { return filepath.Join(s.cfg.Dir, "index.db") }

// openDB opens index.db; one that is no database any more is replaced.
func (s *Store) openDB() error {
	open := func() error {
		// All of it is read only if it has not been closed in good order: that takes as
		// long as the store is large.
		sealed, err := boltcheck.Sealed(s.dbPath())
		if err == nil && (!sealed || s.cfg.Thorough) {
			err = boltcheck.Pages(s.dbPath())
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		db, err := bolt.Open(s.dbPath(), 0o600, &bolt.Options{
			Timeout:      time.Second, // for the lock
			FreelistType: bolt.FreelistMapType,
			// The free list is written by Close, and else rebuilt at open: writing it
			// at every commit costs more.
			NoFreelistSync: true,
			// Address space, not memory: growing a smaller map waits for readers, and
			// a check reads for as long as it takes.
			InitialMmapSize: 16 << 30,
		})
		s.db = db
		return err
	}
	err := guard(open)
	if errors.Is(err, bolterrors.ErrTimeout) || errors.Is(err, boltcheck.ErrInUse) {
		return fmt.Errorf("store: %s is in use by another process", s.cfg.Dir)
	}
	if errors.Is(err, bolterrors.ErrInvalid) || errors.Is(err, bolterrors.ErrChecksum) || errors.Is(err, bolterrors.ErrVersionMismatch) ||
		errors.Is(err, blockdev.ErrCorrupt) {
		s.cfg.Log.Error("the store's index is damaged; starting with an empty store", "dir", s.cfg.Dir, "error", err)
		if err := os.Remove(s.dbPath()); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		err = guard(open)
	}
	if err != nil {
		return diskError("open index.db", err)
	}
	return nil
}

// guard turns a panic of bbolt, which is how it reports a damaged page, into an
// error, so that one bad page does not take the process down.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a page number far off
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("store: %w: %v", errDamaged, r)
		}
	}()
	return f()
}

// view runs a read transaction.
func (s *Store) view(f func(tx *bolt.Tx) error) error {
	return mapClosed(s.guard(func() error { return s.db.View(f) }))
}

// guard is guard for what is done with an open index.db: after damage the next Open is to
// check it in full.
func (s *Store) guard(f func() error) error {
	err := guard(f)
	if errors.Is(err, errDamaged) && !s.doubtful.Swap(true) {
		s.cfg.Log.Error("the store's index is damaged; the next start checks it, and begins with an empty store; restart the supernode", "dir", s.cfg.Dir, "error", err)
	}
	return err
}

// errDamaged: index.db cannot be read.
var errDamaged = fmt.Errorf("index.db: %w", blockdev.ErrCorrupt)

func mapClosed(err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

// Close waits for running transactions, writes the last uses down and closes
// the store. Ingest sessions that are still open are aborted.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	var open []*Ingest
	for in := range s.sessions {
		open = append(open, in)
	}
	s.mu.Unlock()
	close(s.stop)
	s.wg.Wait()
	for _, in := range open {
		in.Abort()
	}
	err := s.flushUses()
	if !s.doubtful.Load() {
		if serr := boltcheck.Seal(s.db); !errors.Is(serr, bolterrors.ErrDatabaseNotOpen) {
			err = errors.Join(err, serr)
		}
	}
	return errors.Join(err, s.db.Close(), s.packs.close(), s.comp.close())
}

// Stats is a snapshot of a store's state and of its counters since Open.
type Stats struct {
	Diffs, Layers int
	Used, Quota   int64 // bytes on disk
	Evicted       int64 // diffs
	EvictedBytes  int64 // bytes on disk
	PutBytes      int64 // raw bytes of chunks that were new
	StoredBytes   int64 // the same, as stored now: less what was compressed since
	DueBytes      int64 // raw bytes of chunks that are still to be compressed
	Deduplicated  int64 // raw bytes of chunks that were there already
	Damaged       int64 // chunks and indexes found damaged
}

type counters struct {
	evicted, evictedBytes, putBytes, storedBytes, dedup, damaged int64
}

// Stats returns a snapshot.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{
		Diffs: len(s.diffs), Layers: len(s.layers), Used: s.used, Quota: s.quota,
		Evicted: s.stats.evicted, EvictedBytes: s.stats.evictedBytes,
		PutBytes: s.stats.putBytes, StoredBytes: s.stats.storedBytes,
		Deduplicated: s.stats.dedup, Damaged: s.stats.damaged, DueBytes: s.due,
	}
}

// at calls the tests' hook.
func (s *Store) at(point string) {
	if s.cfg.hook != nil {
		s.cfg.hook(point)
	}
}

// freeSpace returns the bytes that the store's file system has left for it.
func (s *Store) freeSpace() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &st); err != nil {
		return 0, fmt.Errorf("store: statfs %s: %w", s.cfg.Dir, err)
	}
	total := int64(st.Blocks) * st.Bsize
	return int64(st.Bavail)*st.Bsize - min(diskMargin, total/16), nil
}

// writeUses writes last uses down now and then.
func (s *Store) writeUses() {
	t := time.NewTicker(s.cfg.TouchInterval)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
			if err := s.flushUses(); err != nil {
				s.cfg.Log.Warn("store: last uses of diffs not written", "error", err)
			}
		}
	}
}
