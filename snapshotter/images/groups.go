package images

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

// groups tells Groups what changes in the records.
type groups struct {
	to      Groups // nil: nobody
	records *records
}

func (g groups) join(img *imageRecord) {
	if g.to != nil {
		g.to.Join(img.Manifest, img.diffs(), img.Grant)
	}
}

// unopened tells of an image that could not be opened, unless it is here from before.
func (g groups) unopened(manifest blockdev.Digest) error {
	if g.to == nil {
		return nil
	}
	list, err := g.records.images()
	if err == nil {
		g.leave(manifest, list)
	}
	return err
}

// without tells of images one of whose diffs is gone.
func (g groups) without(diff blockdev.Digest) error {
	if g.to == nil {
		return nil
	}
	list, err := g.records.images()
	if err != nil {
		return err
	}
	for _, img := range list {
		if slices.Contains(img.diffs(), diff) {
			g.to.Leave(img.Manifest)
		}
	}
	return nil
}

// leave tells of an image, unless it is on record under another reference.
func (g groups) leave(manifest blockdev.Digest, left []imageRecord) {
	if g.to != nil && !slices.ContainsFunc(left, func(img imageRecord) bool { return img.Manifest == manifest }) {
		g.to.Leave(manifest)
	}
}
