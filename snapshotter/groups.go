package snapshotter

import (
	"slices"

	"github.com/shoalfs/shoal/blockdev"
)

// Groups learns which images this node has all indexes of, so that it may share
// their chunks. Its methods return at once.
type Groups interface {
	// Join: the image with this manifest is here. It is called again when the
	// indexes have been fetched again. grant is image.Image.Grant.
	Join(manifest blockdev.Digest, diffs []blockdev.Digest, grant []byte)
	// Leave: it is not any more. It may not have been joined.
	Leave(manifest blockdev.Digest)
}

// joinGroups tells of the images that were here when the last process ended.
func (s *Snapshotter) joinGroups(chains map[string]struct{}) error {
	if s.cfg.Groups == nil {
		return nil
	}
	list, err := s.records.images()
	if err != nil {
		return err
	}
	for _, img := range list {
		if _, ok := chains[img.Top]; ok || img.Kept {
			s.joinGroup(&img)
		}
	}
	return nil
}

func (s *Snapshotter) joinGroup(img *imageRecord) {
	if s.cfg.Groups != nil {
		s.cfg.Groups.Join(img.Manifest, img.diffs(), img.Grant)
	}
}

// leaveUnopened tells of an image that could not be opened, unless it is here from
// before.
func (s *Snapshotter) leaveUnopened(manifest blockdev.Digest) error {
	if s.cfg.Groups == nil {
		return nil
	}
	list, err := s.records.images()
	if err == nil && !slices.ContainsFunc(list, func(img imageRecord) bool { return img.Manifest == manifest }) {
		s.cfg.Groups.Leave(manifest)
	}
	return err
}

// leaveGroups tells of images one of whose diffs is gone.
func (s *Snapshotter) leaveGroups(diff blockdev.Digest) error {
	if s.cfg.Groups == nil {
		return nil
	}
	list, err := s.records.images()
	if err != nil {
		return err
	}
	for _, img := range list {
		if slices.Contains(img.diffs(), diff) {
			s.cfg.Groups.Leave(img.Manifest)
		}
	}
	return nil
}
