package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/fusefs"
	"github.com/shoalfs/shoal/blockdev/mount"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/tasks"
)

// Directories below Root.
const (
	fuseDir   = "fuse"
	mountsDir = "m"
	lazyDir   = "lazy"
	probeDir  = "probe"
)

// Open opens the volumes below cfg.Root. Native mounts that an earlier process
// left are adopted. So is its FUSE mount, with the lazy mounts over it, if the
// Keeper has its descriptor: reads that waited for the new process are answered. Otherwise
// these are detached and mounted again at the same mount points, and a container on them gets
// I/O errors. Mounts and mount points of diffs that are not there any more are
// removed. It fails if another process has Root open. Reads of what is here are answered
// from now on; those that miss bytes wait for Attach.
func Open(ctx context.Context, cfg Config) (_ *Manager, err error) {
	if cfg.Root == "" {
		return nil, errors.New("volume: Root must be set")
	}
	defaults.Log(&cfg.Log)
	defaults.Positive(&cfg.PrefetchDiffs, 2)
	defaults.Set(&cfg.ScrubInterval, defaultScrub)
	defaults.Positive(&cfg.RetireAfter, defaultRetire)
	root, err := makeRoot(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("volumes at %s: %w", cfg.Root, err)
	}
	m := &Manager{
		cfg:    cfg,
		root:   root,
		late:   newLate(),
		mounts: newMounter(cfg, root),
		chores: tasks.New(),
		vols:   make(map[blockdev.Digest]*volume),
		left:   make(map[blockdev.Digest]leftMount),
	}
	m.startups = newStartups(cfg.Log, m.late)
	cc := cfg.Cache
	cc.Root, cc.Log = root, cfg.Log
	cc.Source, cc.Inflight, cc.MakeRoom = m.late, m.late.inflight, m.late.makeRoom
	cc.Damaged = m.damaged // not before there are reads, and they go through m
	m.conn = newConnection(cfg, root, m.late.describe)
	c, err := cache.Open(ctx, cc)
	if err != nil {
		return nil, err
	}
	m.cache = c
	m.queues = newQueues(cfg, m.mounts)
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	left, err := leftMounts(root)
	if err != nil {
		return nil, err
	}
	kept := m.conn.adopt(left)
	if kept != nil {
		// Somebody waits for it. The rest takes its time.
		if err := m.conn.serve(ctx, files{m}, kept); err != nil {
			return nil, err
		}
	}
	for _, d := range c.Diffs() {
		if _, err := m.adopt(d); err != nil {
			return nil, err
		}
	}
	again, err := m.takeOver(left, kept != nil)
	if err != nil {
		return nil, err
	}
	if kept == nil {
		if err := m.conn.serve(ctx, files{m}, nil); err != nil {
			return nil, err
		}
	}
	m.mounts.probe()
	for _, v := range again {
		// One that cannot be mounted now is reported, and tried again when it is
		// asked for. The others are not to suffer.
		if _, err := m.Mount(ctx, v.id); err != nil {
			cfg.Log.Error("cannot mount a diff that the last process had mounted; the next request for the diff tries again", "diff", v.id, "error", err)
		}
	}
	for _, v := range m.volumes() {
		if v.diff.Complete() {
			m.queues.prove(v)
		} else if v.diff.Completed() {
			m.queues.refetch(v) // the last process has found damage, and did not get to it
		}
	}
	if err := m.sweep(); err != nil {
		return nil, err
	}
	if cfg.ScrubInterval > 0 {
		m.queues.scrubs.tasks.Go(func() { m.queues.scrubber(cfg.ScrubInterval, m.volumes) })
	}
	m.chores.Run(func() { m.mounts.matcher(m.chores.Context(), m.volumes) })
	return m, nil
}

// makeRoot makes the directories, and returns Root as mountinfo will show it.
func makeRoot(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	// The mount points below may have set-uid files and devices: for root only.
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return "", err
	}
	root, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return "", err
	}
	if strings.Contains(root, ",") {
		return "", errors.New("a comma in the path cannot be passed in mount options")
	}
	// fuse may be a dead mount, which does not matter to mkdir(2).
	for _, sub := range []string{fuseDir, mountsDir, lazyDir} {
		if err := mount.MkdirMountpoint(filepath.Join(root, sub)); err != nil {
			return "", err
		}
	}
	return root, nil
}

// files shows the cache's diffs to FUSE. It is asked before there is a volume for
// each of them, and then opens what it is asked for.
type files struct{ m *Manager }

func (f files) Open(id blockdev.Digest) (fusefs.File, bool) {
	f.m.mu.RLock()
	v, ok := f.m.vols[id]
	f.m.mu.RUnlock()
	if ok {
		return v.diff, true
	}
	d, ok := f.m.cache.Get(id)
	if !ok {
		return nil, false
	}
	return d, true
}

func (f files) List() []blockdev.Digest { return f.m.cache.Known() }
