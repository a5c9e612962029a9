package ingest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// spool keeps the spool files.
type spool struct {
	dir    string
	quota  int64 // bytes
	key    string
	expiry time.Duration
	now    func() time.Time

	waiting atomic.Int64 // how many wait for room

	mu    sync.Mutex
	open  map[string]int64 // file name -> bytes that it may grow to
	freed chan struct{}    // closed and replaced when a file is given up
}

func newSpool(dir string, quota int64, key string, expiry time.Duration) (*spool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("spool: %w", err)
	}
	s := &spool{
		dir: dir, quota: quota, key: key, expiry: expiry, now: time.Now,
		open: make(map[string]int64), freed: make(chan struct{}),
	}
	return s, s.expire()
}

// spoolFile is a file that a flight has to itself.
type spoolFile struct {
	s    *spool
	name string
	f    *os.File
	// length is how much was there when it was opened, in bytes.
	length int64
}

// take opens the file name for a blob of size bytes, with what it holds from an
// earlier attempt. It deletes files without a flight to get room. While other
// flights have it all it returns a channel for wait in place of a file.
func (s *spool) take(name string, size int64) (_ *spoolFile, freed <-chan struct{}, _ error) {
	if s.quota > 0 && size > s.quota {
		return nil, nil, fmt.Errorf("spool: a layer of %d MiB: %w: the quota is %d MiB; raise %s", size>>20, blockdev.ErrNoSpace, s.quota>>20, s.key)
	}
	ok, freed, err := s.reserve(name, size)
	if err != nil || !ok {
		return nil, freed, err
	}
	sf, err := s.openFile(name, size)
	if err != nil {
		s.release(name)
		return nil, nil, err
	}
	return sf, nil, nil
}

// wait waits until some file was given up, or for ctx's cause.
func (s *spool) wait(ctx context.Context, freed <-chan struct{}) error {
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	select {
	case <-freed:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// reserve takes room for size bytes; if there is none, wait tells when to try
// again.
func (s *spool) reserve(name string, size int64) (ok bool, wait <-chan struct{}, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, busy := s.open[name]; busy {
		return false, s.freed, nil
	}
	if s.quota > 0 {
		need := size
		for _, n := range s.open {
			need += n
		}
		// Directory entries only; these are a handful of files.
		orphans, err := s.orphansLocked(name)
		if err != nil {
			return false, nil, err
		}
		for _, o := range orphans {
			need += o.size
		}
		for len(orphans) > 0 && need > s.quota {
			if err := os.Remove(filepath.Join(s.dir, orphans[0].name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return false, nil, fmt.Errorf("spool: %w", err)
			}
			need -= orphans[0].size
			orphans = orphans[1:]
		}
		if need > s.quota {
			return false, s.freed, nil
		}
	}
	s.open[name] = size
	return true, nil, nil
}

type orphan struct {
	name  string
	size  int64
	mtime time.Time
}

// orphansLocked lists files without a flight other than name, oldest first.
func (s *spool) orphansLocked(name string) ([]orphan, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("spool: %w", err)
	}
	var list []orphan
	for _, e := range entries {
		if _, busy := s.open[e.Name()]; busy || e.Name() == name {
			continue
		}
		fi, err := e.Info()
		if err != nil {
			continue // gone since
		}
		list = append(list, orphan{e.Name(), fi.Size(), fi.ModTime()})
	}
	for i := range list { // insertion sort of a handful
		for j := i; j > 0 && list[j].mtime.Before(list[j-1].mtime); j-- {
			list[j], list[j-1] = list[j-1], list[j]
		}
	}
	return list, nil
}

func (s *spool) openFile(name string, size int64) (*spoolFile, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, diskError(err)
	}
	fi, err := f.Stat()
	if err == nil && fi.Size() > size {
		err = f.Truncate(0)
		fi = nil
	}
	var length int64
	if fi != nil {
		length = fi.Size()
	}
	var st unix.Statfs_t
	if err == nil {
		err = unix.Fstatfs(int(f.Fd()), &st)
	}
	if err != nil {
		return nil, errors.Join(diskError(err), f.Close())
	}
	if free := int64(st.Bavail) * st.Bsize; free < size-length {
		return nil, errors.Join(fmt.Errorf("spool: %w: a layer needs %d MiB more, the disk of %s has %d MiB", blockdev.ErrNoSpace, (size-length)>>20, s.dir, free>>20), f.Close())
	}
	return &spoolFile{s: s, name: name, f: f, length: length}, nil
}

func (s *spool) release(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, name)
	close(s.freed)
	s.freed = make(chan struct{})
}

// giveUp closes the file, and deletes it unless keep. An empty one is never kept.
func (sf *spoolFile) giveUp(keep bool) error {
	var err error
	if fi, serr := sf.f.Stat(); !keep || (serr == nil && fi.Size() == 0) {
		err = os.Remove(sf.f.Name())
	}
	err = errors.Join(err, sf.f.Close())
	sf.s.release(sf.name)
	return err
}

// restart empties the file.
func (sf *spoolFile) restart() error {
	sf.length = 0
	if err := sf.f.Truncate(0); err != nil {
		return diskError(err)
	}
	return nil
}

// expire deletes files that nobody has gone on with for too long.
func (s *spool) expire() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	orphans, err := s.orphansLocked("")
	if err != nil {
		return err
	}
	for _, o := range orphans {
		if s.now().Sub(o.mtime) > s.expiry {
			err = errors.Join(err, os.Remove(filepath.Join(s.dir, o.name)))
		}
	}
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	return nil
}

// use returns the bytes that layers under way may take.
func (s *spool) use() blockdev.Use {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := blockdev.Use{Capacity: s.quota}
	for _, n := range s.open {
		u.Used += n
	}
	return u
}

// diskError makes a full disk testable.
func diskError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("spool: %w: %w", blockdev.ErrNoSpace, err)
	}
	return fmt.Errorf("spool: %w", err)
}
