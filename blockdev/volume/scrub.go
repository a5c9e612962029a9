package volume

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev/cache"
)

// defaultScrub is how often everything on the disk is read and checked, if Config
// does not say.
const defaultScrub = 7 * 24 * time.Hour

// newScrubQueue makes the queue that checks local diffs, one at a time, when there
// is nothing else to do.
func (m *Manager) newScrubQueue() *queue {
	return newQueue(m.cfg.Log, 1, task{
		name:  "scrub",
		note:  func(v *volume) *fetchState { return &v.scrub },
		do:    func(ctx context.Context, v *volume, _ bool) error { return v.diff.Scrub(ctx) },
		hold:  func() bool { return m.queue.busy() || m.proofs.busy() },
		final: func(error) bool { return true },
		ended: func(v *volume, err error) {
			if errors.Is(err, cache.ErrDamaged) {
				m.cfg.Log.Error("a scrub has found damage; it is fetched again", "diff", v.id, "error", err)
				m.refetch(v)
			}
		},
	})
}

// refetch brings back what was found damaged.
func (m *Manager) refetch(v *volume) {
	v.mu.Lock()
	v.stale = true
	v.mu.Unlock()
	_, _ = m.queue.add(v, false) // refused: it is being removed, or closed
}

// scrubber queues the diffs whose time has come.
func (m *Manager) scrubber(ctx context.Context) {
	t := time.NewTicker(min(m.cfg.ScrubInterval/8, 10*time.Minute))
	defer t.Stop()
	for {
		for _, v := range m.volumes() {
			if time.Since(v.diff.Scrubbed()) >= m.cfg.ScrubInterval {
				_, _ = m.scrubs.add(v, false)
			}
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// refresh has the kernel forget what it has cached of a mount whose bytes were put
// right beneath it. Pages that are mapped stay.
func (m *Manager) refresh(v *volume) {
	v.mu.Lock()
	dir, stale := v.dir, v.stale
	v.stale = false
	v.mu.Unlock()
	if !stale || dir == "" {
		return
	}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		return errors.Join(unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED), unix.Close(fd))
	})
	m.cfg.Log.Warn("damaged bytes of a mounted layer are right again; programs that have read them before may need a restart", "diff", v.id, "error", err)
}
