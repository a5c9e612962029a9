package store

import (
	"errors"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
)

// freeing is what there is to free of a diff.
type freeing struct {
	refs []blockdev.Digest // unless there are many lists
}

func (f *freeing) had(d blockdev.Digest) bool {
	if f == nil {
		return false
	}
	_, had := slices.BinarySearchFunc(f.refs, d, compareDigests)
	return had
}

// replaceDiff drops the references and extents of a diff's earlier version. If these
// are many, the caller does so with c.drops, after the commit.
func (c *change) replaceDiff(id blockdev.Digest, old *freeing) error {
	r, ok, err := getDiff(c.tx, id)
	if err != nil {
		return c.wantRecount()
	}
	if !ok {
		return nil
	}
	if old == nil {
		// Damaged, or the diff came between: what it had is freed by the recount.
		return c.wantRecount()
	}
	if len(r.More) > 0 {
		c.drops = append(c.drops, r.Index.Pack)
		return c.putUnpublished(r.Index.Pack, unpublishedRecord{Lists: r.lists(), Index: &r.Index})
	}
	for _, d := range old.refs {
		if err := c.unref(d); err != nil {
			return err
		}
	}
	c.free(r.Index)
	c.free(r.Refs)
	return nil
}

// refsOf returns the reference lists of a diff: nil if there is no such diff or
// one of them is damaged.
func (s *Store) refsOf(id blockdev.Digest) (lists [][]blockdev.Digest, err error) {
	r, ok, err := s.db.diff(id)
	if err != nil || !ok {
		return nil, err
	}
	for _, e := range r.lists() {
		refs, err := s.packs.readList(e)
		if err != nil {
			s.cfg.Log.Error("store: the reference list of a diff is damaged", "diff", id, "error", err)
			return nil, nil
		}
		lists = append(lists, refs)
	}
	return lists, nil
}

// freeable returns what there is to free of a diff: nil if that is not known. It is
// not, either, if its index is not where its record says: what lies there then may be
// somebody else's.
func (s *Store) freeable(id blockdev.Digest) (*freeing, error) {
	r, ok, err := s.db.diff(id)
	if errors.Is(err, blockdev.ErrCorrupt) || err == nil && !ok {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := s.packs.read(r.Index, nil); err != nil {
		s.cfg.Log.Error("store: the index of a diff is damaged", "diff", id, "error", err)
		return nil, nil
	}
	if len(r.More) > 0 {
		return &freeing{}, nil // drop looks at the lists, one at a time
	}
	refs, err := s.packs.readList(r.Refs)
	if err != nil {
		s.cfg.Log.Error("store: the reference list of a diff is damaged", "diff", id, "error", err)
		return nil, nil
	}
	return &freeing{refs}, nil
}
