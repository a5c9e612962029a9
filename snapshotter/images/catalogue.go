package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/lru"
	"github.com/shoalfs/shoal/internal/tasks"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

var (
	// ErrClosed ends calls that wait when a Catalogue, or its snapshotter, is closed.
	ErrClosed = fmt.Errorf("the snapshotter is being closed: %w", errdefs.ErrUnavailable)
	// ErrSlow is the cause of a context that ends because a call of containerd has taken
	// its time.
	ErrSlow = errors.New("the time for the call is used up")
)

// Layer is one layer of an image on this node.
type Layer struct {
	// Digest and Size (bytes) are those of the compressed blob.
	Digest blockdev.Digest `json:"digest"`
	Size   int64           `json:"size"`
	DiffID blockdev.Digest `json:"diffID"`
}

// Image is an image that is lazy on this node, or kept.
type Image struct {
	// Ref is the reference it was opened by. An image that got another name since,
	// without a pull, is still listed under this one.
	Ref      string          `json:"ref"`
	Manifest blockdev.Digest `json:"manifest"`
	// Layers from the bottom up.
	Layers []Layer `json:"layers"`
	// Kept: Keep holds it, and it has not been pulled since.
	Kept bool `json:"kept"`
}

// Snapshots is what a Catalogue asks of the snapshotter.
type Snapshots interface {
	// Chains returns the ChainIDs of all lazy snapshots.
	Chains(ctx context.Context) (map[string]struct{}, error)
	// Lost reports whether snapshots were lost, so that nobody knows which diffs
	// running containers use. As long as it does, no diff is removed.
	Lost() bool
	// Mounted returns the ids of the snapshots that are mounted; nil: that is not known.
	Mounted() map[string]struct{}
}

// Catalogue is what this node knows of images: which are here, what uses their diffs,
// and how those that are asked for get here. It is safe for concurrent use.
type Catalogue struct {
	cfg        Config
	log        *slog.Logger
	policy     atomic.Pointer[policy.Policy]
	records    *records
	refs       refs
	groups     groups
	rights     rights
	room       *indexRoom
	opener     *opener
	openings   openings
	pulls      pulls
	recoveries *recoveries
	rewarmings *rewarmings
	refusals   refusals
	wishes     *wishes
	snapshots  Snapshots // set by Start

	tasks    *tasks.Group
	closed   sync.Once
	closeErr error // that of the first Close
}

// Open opens the catalogue below cfg.Root. It answers what its records answer from
// then on; the rest begins with Start. The caller must Close it.
func Open(cfg Config) (*Catalogue, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	c := &Catalogue{cfg: cfg, log: cfg.Log, tasks: tasks.New(), room: newIndexRoom(smallIndexes, roomForSmall, roomForLarge)}
	c.policy.Store(cfg.Policy)
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, err
	}
	var err error
	if c.records, err = openRecords(cfg.Root, c.log); err != nil {
		return nil, err
	}
	c.refusals.log = c.log
	c.refusals.added = func(r Refusal) { c.cfg.Pulled(r.Ref, &r) }
	c.groups = groups{cfg.Groups, c.records}
	c.rights = rights{own: cfg.Credentials, ownForPulls: cfg.NodeCredentials,
		m: lru.New[openKey, right](maxRights), unclaimed: lru.New[string, struct{}](maxRights)}
	c.opener = &opener{cfg: &c.cfg, policy: &c.policy, records: c.records, refs: &c.refs, groups: c.groups, rights: &c.rights, room: c.room}
	c.recoveries, c.rewarmings = newRecoveries(c.opener), newRewarmings(c.opener)
	c.wishes = newWishes(cfg.Data, cfg.PrefetchAfterExit)
	c.openings = openings{base: c.tasks.Context(), timeout: cfg.IndexTimeout, idle: cfg.PullIdle, ended: c.unused, failed: c.impossible}
	c.pulls = pulls{openings: &c.openings, idle: cfg.PullIdle}
	return c, nil
}

// Start gives the catalogue its snapshots, of which the lazy ones stand for the diffs in
// use. It removes what nobody uses, in the background, and takes up what an earlier
// process wanted fetched. It is called once, before Join.
func (c *Catalogue) Start(ctx context.Context, s Snapshots, use []blockdev.Digest) error {
	c.snapshots = s
	for _, diff := range use {
		c.refs.addSnapshot(diff)
	}
	// Kept images before the rest, of which Evict may be called to make room from then on.
	if err := c.refs.countKept(c.records); err != nil {
		return err
	}
	if err := c.records.adoptAll(c.cfg.Data, c.log); err != nil {
		return err
	}
	listed, err := c.records.diffs()
	if err != nil {
		return err
	}
	for _, id := range append(listed, c.cfg.Data.Diffs()...) {
		c.refs.known(id)
	}
	chains, err := s.Chains(ctx)
	if err != nil {
		return err
	}
	if err := c.releasePulled(chains); err != nil {
		return err
	}
	if err := c.prune(ctx); err != nil {
		return err
	}
	list, err := c.records.images()
	if err != nil {
		return err
	}
	for _, img := range list {
		if _, ok := chains[img.Top]; ok || img.Kept {
			c.groups.join(&img)
		}
		if img.Unfollowed && c.wantedWhole(img.Ref) {
			c.wishes.await(&img)
		}
	}
	c.tasks.Run(func() { c.sweep(c.tasks.Context()) })
	c.tasks.Run(func() { c.wishes.watch(c.tasks.Context(), s.Mounted) })
	c.tasks.Run(func() { c.forgetKeys(c.tasks.Context()) })
	return nil
}

// Close ends background work and pulls that wait for indexes. Diffs stay as they are. A
// second call does nothing.
func (c *Catalogue) Close() error {
	c.closed.Do(func() {
		c.tasks.End()
		c.pulls.close()
		c.openings.close()
		c.recoveries.flights.Close()
		c.rewarmings.flights.Close()
		c.tasks.Close()
		c.closeErr = c.records.close()
	})
	return c.closeErr
}

// SetPolicy changes Config.Policy, for pulls and containers that begin from now on.
func (c *Catalogue) SetPolicy(p *policy.Policy) { c.policy.Store(p) }

// countKept counts what the kept images on record use.
func (r *refs) countKept(rs *records) error {
	list, err := rs.images()
	if err != nil {
		return err
	}
	for _, img := range list {
		if img.Kept {
			r.keep(img.diffs(), 1)
		}
	}
	return nil
}

// releasePulled releases kept images that were pulled just before the last process ended.
func (c *Catalogue) releasePulled(chains map[string]struct{}) error {
	list, err := c.records.images()
	if err != nil {
		return err
	}
	for _, img := range list {
		if _, pulled := chains[img.Top]; img.Kept && pulled {
			if err := c.release(img.Manifest); err != nil {
				return err
			}
		}
	}
	return nil
}

// Images lists the images that are lazy on this node or kept, sorted by reference.
func (c *Catalogue) Images(ctx context.Context) ([]Image, error) {
	chains, err := c.snapshots.Chains(ctx)
	if err != nil {
		return nil, err
	}
	records, err := c.records.images()
	if err != nil {
		return nil, err
	}
	var list []Image
	for _, rec := range records {
		img := Image{Ref: rec.Ref, Manifest: rec.Manifest, Layers: rec.Layers, Kept: rec.Kept}
		if _, ok := chains[rec.Top]; ok || img.Kept {
			list = append(list, img)
		}
	}
	slices.SortFunc(list, func(a, b Image) int {
		return strings.Compare(a.Ref+" "+a.Manifest.Hex(), b.Ref+" "+b.Manifest.Hex())
	})
	return list, nil
}

// IndexRoom returns the memory for encoded indexes of pulls: bytes, and how many
// openings wait for some.
func (c *Catalogue) IndexRoom() blockdev.Use { return c.room.use() }

// Refusals returns the images that were not lazy when they were pulled, the newest
// pull last: some of them, if there were many. They are forgotten when the node
// ends.
func (c *Catalogue) Refusals() []Refusal { return c.refusals.all() }

// Refused returns how many pulls were not lazy for a cause.
func (c *Catalogue) Refused(cause Cause) int64 { return c.refusals.counted(cause) }

// Mount returns where the block image of a diff that a snapshot stands for is mounted. If
// the data path has lost the diff, then its index is fetched again.
func (c *Catalogue) Mount(ctx context.Context, id blockdev.Digest) (string, error) {
	return c.recoveries.mount(ctx, id)
}

// Implied returns blockdev.Index.Implied of a diff that has been added.
func (c *Catalogue) Implied(id blockdev.Digest) ([]string, error) { return c.records.implied(id) }

// FullUse returns what a diff takes of the disk once it is complete. A diff that is lost
// takes nothing.
func (c *Catalogue) FullUse(id blockdev.Digest) (bytes, inodes int64, err error) {
	bytes, inodes, err = c.cfg.Data.FullUse(id)
	if errors.Is(err, blockdev.ErrNotFound) {
		return 0, 0, nil
	}
	return bytes, inodes, err
}

// AddSnapshot notes that a snapshot uses a diff, before the snapshot can be seen, and so
// removed. The diff must be in use by a pull.
func (c *Catalogue) AddSnapshot(id blockdev.Digest) { c.refs.addSnapshot(id) }

// DropSnapshot notes that a snapshot of AddSnapshot or Start is gone.
func (c *Catalogue) DropSnapshot(id blockdev.Digest) { c.refs.dropSnapshot(id) }
