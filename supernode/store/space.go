package store

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// diskMargin is left free on the file system, so that there is always room for
// the transaction that frees some.
const diskMargin = 32 << 20

// space counts the bytes on disk that the store takes (packs, index.db, and what running
// ingests have reserved) against the quota. Its lock is never held across I/O.
type space struct {
	dir    string
	limit  int64  // that the user allows; 0 or less: what the file system has
	key    string // how the user calls that
	packs  *packs
	dbPath string

	mu      sync.Mutex
	quota   int64 // limit, or what the disk has if that is less
	used    int64
	dbUse   int64            // the part of used that is index.db
	packUse map[uint64]int64 // the parts that are packs
}

// free returns the bytes that the store's file system has left for it.
func (s *space) free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, fmt.Errorf("store: statfs %s: %w", s.dir, err)
	}
	total := int64(st.Blocks) * st.Bsize
	return int64(st.Bavail)*st.Bsize - min(diskMargin, total/16), nil
}

// fit makes the quota what the user allows, or what the disk has if that is
// less now: others fill it, and free it again.
func (s *space) fit() error {
	free, err := s.free()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quota = max(0, s.used+free)
	if s.limit > 0 {
		s.quota = min(s.quota, s.limit)
	}
	return nil
}

func (s *space) reserve(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used+n > s.quota {
		return false
	}
	s.used += n
	return true
}

func (s *space) unreserve(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= n
}

// recount looks at the disk what index.db and these packs take now, in place of what they
// took before and of reserved bytes.
func (s *space) recount(packs map[uint64]int64, reserved int64) {
	for id := range packs {
		packs[id] = s.packs.diskUse(id)
	}
	dbUse := fileUse(s.dbPath)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used += dbUse - s.dbUse - reserved
	s.dbUse = dbUse
	for id, n := range packs {
		s.used += n - s.packUse[id]
		s.packUse[id] = n
		if n == 0 {
			delete(s.packUse, id)
		}
	}
}

func (s *space) numbers() (used, quota int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used, s.quota
}

// exhausted is the error where there is no room, and nothing to evict.
func (s *space) exhausted(pinned, ingests int) error {
	used, quota := s.numbers()
	if s.limit <= 0 || quota < s.limit {
		return fmt.Errorf("store: %w: the disk of %s has %d MiB left for it, and all content of the store is in use (%d diffs pinned, %d ingests running); make room on it",
			blockdev.ErrNoSpace, s.dir, max(0, quota-used)>>20, pinned, ingests)
	}
	return fmt.Errorf("store: %w: the quota of %d MiB is taken by images in use (%d diffs pinned, %d ingests running); raise %s",
		blockdev.ErrNoSpace, quota>>20, pinned, ingests, s.key)
}
