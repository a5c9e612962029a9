package images

import (
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// Container is an active snapshot, or a view, that is not for unpacking a layer.
type Container struct {
	Key   string // of the snapshot
	ID    string
	View  bool
	Chain string            // ChainID of the topmost image layer below it
	Diffs []blockdev.Digest // of all layers below it, the top first
}

func (ct *Container) wish() container {
	return container{id: ct.ID, view: ct.View, diffs: ct.Diffs, since: time.Now()}
}

// ContainerStarts has what a container may need fetched, as the config says: from
// the top, where the image's own program is; what is below is more often shared, and
// here already.
func (c *Catalogue) ContainerStarts(ct Container) {
	c.cfg.Data.ContainerStarts(ct.Diffs...)
	mode, images := c.imagesOf(ct.Chain)
	for _, rec := range images {
		c.wishes.follow(string(rec.key()))
		if !rec.Unfollowed {
			continue
		}
		if err := c.records.followed(&rec); err != nil {
			c.log.Error("cannot record that a container uses a pulled image; after a restart the whole image is prefetched", "image", rec.Ref, "error", err)
		}
	}
	if mode == policy.All {
		c.wishes.start(ct.Key, ct.wish())
	}
}

// ContainerFound takes up the wish of a container that an earlier process has known.
func (c *Catalogue) ContainerFound(ct Container) {
	if mode, _ := c.imagesOf(ct.Chain); mode == policy.All {
		c.wishes.found(ct.Key, ct.wish())
	}
}

// ContainerEnds notes that a snapshot is gone, and its container with it, if it had one.
func (c *Catalogue) ContainerEnds(key string) { c.wishes.end(key) }

// imagesOf returns the images that a chain is, and the mode of prefetch that wants
// most of it. A chain that no image on record is has the mode of no image in
// particular.
func (c *Catalogue) imagesOf(chain string) (policy.Mode, []imageRecord) {
	list, err := c.records.images()
	if err != nil {
		c.log.Error("cannot look up the image of a container", "error", err)
	}
	var found []imageRecord
	for _, rec := range list {
		if chain != "" && rec.Top == chain {
			found = append(found, rec)
		}
	}
	if len(found) == 0 {
		return c.policy.Load().Prefetch(""), nil
	}
	most := policy.None
	for _, rec := range found {
		switch mode := c.policy.Load().Prefetch(rec.Ref); {
		case mode == policy.All, mode == policy.Startup && most == policy.None:
			most = mode
		}
	}
	return most, found
}

// wantedWhole says whether an image that no container has followed is fetched whole.
func (c *Catalogue) wantedWhole(ref string) bool {
	return c.cfg.PrefetchAfterPull && c.policy.Load().Prefetch(ref) == policy.All
}
