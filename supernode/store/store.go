package store

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shoalfs/shoal/internal/defaults"
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
	// back, or says false. If nil, then none can be given back.
	Yield func() bool

	// For tests: the size of a step and of a run, and what is called at points
	// of a run.
	stepBytes, runBytes int64
	batch               int
	hook                func(point string)
}

// Store is an open store. All methods may be called from any goroutine.
type Store struct {
	cfg       Config
	db        *database
	packs     *packs
	space     *space
	catalogue *catalogue
	holds     *holds
	sessions  *sessions
	smaller   *recompressor
	damage    damageQueue
	stats     counters
	// evicting is held (by sending) by the one caller that looks for room.
	evicting chan struct{}
	// commit serialises publishing and removing, which change index.db and the
	// catalogue together. Callers that read, or put chunks, never take it.
	commit sync.Mutex

	stop chan struct{}
	wg   sync.WaitGroup
}

// Open opens the store in cfg.Dir, makes one if there is none, and removes what
// a crash has left half-done. Errors wrap blockdev.ErrUnsupported (the
// directory was written by a newer version) or blockdev.ErrNoSpace. A damaged
// index.db is logged and the store starts empty: it is a cache.
func Open(cfg Config) (*Store, error) {
	defaults.Log(&cfg.Log)
	defaults.Set(&cfg.QuotaKey, "store.quota")
	defaults.Positive(&cfg.TouchInterval, 10*time.Minute)
	defaults.Set(&cfg.Idle, defaultIdle)
	if cfg.stepBytes == 0 {
		cfg.stepBytes, cfg.runBytes = stepBytes, runBytes
	}
	if cfg.batch == 0 {
		cfg.batch = batchChunks
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	p, err := newPacks(filepath.Join(cfg.Dir, "packs"), cfg.Log)
	if err != nil {
		return nil, err
	}
	if err := canPunch(p.dir); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	s := &Store{
		cfg:       cfg,
		packs:     p,
		space:     &space{dir: cfg.Dir, limit: cfg.Quota, key: cfg.QuotaKey, packs: p, dbPath: dbPath(cfg.Dir), packUse: map[uint64]int64{}},
		catalogue: newCatalogue(),
		holds:     newHolds(),
		sessions:  newSessions(),
		evicting:  make(chan struct{}, 1),
		stop:      make(chan struct{}),
	}
	if s.smaller, err = newRecompressor(s); err != nil {
		return nil, err
	}
	if s.db, err = openDatabase(cfg.Dir, cfg.Thorough, cfg.Log); err != nil {
		return nil, errors.Join(err, s.smaller.close())
	}
	if err := s.load(); err != nil {
		return nil, errors.Join(err, s.db.Close(), p.close(), s.smaller.close())
	}
	s.wg.Go(s.writeUses)
	if cfg.Idle > 0 {
		s.wg.Go(s.smaller.run)
	}
	return s, nil
}

// Close waits for running transactions, writes the last uses down and closes
// the store. Ingest sessions that are still open are aborted.
func (s *Store) Close() error {
	open, first := s.sessions.close()
	if !first {
		return nil
	}
	close(s.stop)
	s.wg.Wait()
	for _, in := range open {
		in.Abort()
	}
	return errors.Join(s.flushUses(), s.db.seal(), s.packs.close(), s.smaller.close())
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
	evicted, evictedBytes, putBytes, storedBytes, dedup, damaged atomic.Int64
}

// Stats returns a snapshot.
func (s *Store) Stats() Stats {
	diffs, layers, _ := s.catalogue.sizes()
	used, quota := s.space.numbers()
	c := &s.stats
	return Stats{
		Diffs: diffs, Layers: layers, Used: used, Quota: quota,
		Evicted: c.evicted.Load(), EvictedBytes: c.evictedBytes.Load(),
		PutBytes: c.putBytes.Load(), StoredBytes: c.storedBytes.Load(),
		Deduplicated: c.dedup.Load(), Damaged: c.damaged.Load(), DueBytes: s.smaller.due.Load(),
	}
}

func (s *Store) stopping() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
}

// at calls the tests' hook.
func (s *Store) at(point string) {
	if s.cfg.hook != nil {
		s.cfg.hook(point)
	}
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
				s.cfg.Log.Warn("store: cannot write when diffs were used last", "error", err)
			}
		}
	}
}
