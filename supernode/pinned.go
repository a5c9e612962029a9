package supernode

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/durable"
)

const (
	// pinnedFile is where it is kept which images the operator has pinned.
	pinnedFile = "pinned.json"
	// pinnedShare is the part of the store, one in so many, that pinned layers may
	// take, uncompressed: what is asked for again must find room.
	pinnedShare = 2
)

// ErrPinned: the operator has to take the pin away first.
var ErrPinned = errors.New("it is pinned")

// pinnedImage is an image that is kept until it is unpinned, over restarts.
type pinnedImage struct {
	Ref   string       `json:"ref"`
	Diffs []pinnedDiff `json:"diffs"`
}

type pinnedDiff struct {
	ID   blockdev.Digest `json:"diff"`
	Size int64           `json:"size"` // bytes, uncompressed
}

// pinned are the images that are kept, in a file.
type pinned struct {
	path string
	pin  func(blockdev.Digest) (release func())

	mu     sync.Mutex
	images map[string]pinnedImage
	held   map[blockdev.Digest]func()
}

func openPinned(dir string, pin func(blockdev.Digest) func()) (*pinned, error) {
	p := &pinned{path: filepath.Join(dir, pinnedFile), pin: pin, images: map[string]pinnedImage{}, held: map[blockdev.Digest]func(){}}
	b, err := os.ReadFile(p.path)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	var list []pinnedImage
	if err == nil {
		err = json.Unmarshal(b, &list)
	}
	if err != nil {
		// Never passed over: what was pinned would be evicted.
		return nil, fmt.Errorf("list of pinned images %s: %w: correct the file, or delete it and pin the images again", p.path, err)
	}
	for _, im := range list {
		p.images[im.Ref] = im
	}
	p.holdLocked()
	return p, nil
}

// holdLocked pins the diffs of the images in the store, and no others.
func (p *pinned) holdLocked() {
	want := map[blockdev.Digest]bool{}
	for _, im := range p.images {
		for _, d := range im.Diffs {
			want[d.ID] = true
		}
	}
	for id, release := range p.held {
		if !want[id] {
			release()
			delete(p.held, id)
		}
	}
	for id := range want {
		if p.held[id] == nil {
			p.held[id] = p.pin(id)
		}
	}
}

// sizeLocked is what all diffs together take, each counted once.
func (p *pinned) sizeLocked() (n int64) {
	seen := map[blockdev.Digest]bool{}
	for _, im := range p.images {
		for _, d := range im.Diffs {
			if !seen[d.ID] {
				seen[d.ID] = true
				n += d.Size
			}
		}
	}
	return n
}

// set pins an image, or replaces what is pinned by its name, if all take no more than
// limit bytes.
func (p *pinned) set(im pinnedImage, limit int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, had := p.images[im.Ref]
	p.images[im.Ref] = im
	err := error(nil)
	if n := p.sizeLocked(); n > limit {
		err = fmt.Errorf("%s: pinned images would take %d MiB, and at most %d%% of the store, %d MiB, can be pinned: unpin others, or raise store.quota: %w",
			im.Ref, n>>20, 100/pinnedShare, limit>>20, blockdev.ErrNoSpace)
	} else {
		err = p.saveLocked()
	}
	if err != nil {
		delete(p.images, im.Ref)
		if had {
			p.images[im.Ref] = before
		}
		return err
	}
	p.holdLocked()
	return nil
}

// drop unpins an image; false: it is not pinned.
func (p *pinned) drop(ref string) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	im, ok := p.images[ref]
	if !ok {
		return false, nil
	}
	delete(p.images, ref)
	if err := p.saveLocked(); err != nil {
		p.images[ref] = im
		return true, err
	}
	p.holdLocked()
	return true, nil
}

// of names the pinned images that a diff is part of.
func (p *pinned) of(id blockdev.Digest) (refs []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ref, im := range p.images {
		if slices.ContainsFunc(im.Diffs, func(d pinnedDiff) bool { return d.ID == id }) {
			refs = append(refs, ref)
		}
	}
	slices.Sort(refs)
	return refs
}

// saveLocked replaces the file.
func (p *pinned) saveLocked() (err error) {
	list := make([]pinnedImage, 0, len(p.images))
	for _, im := range p.images {
		list = append(list, im)
	}
	slices.SortFunc(list, func(a, b pinnedImage) int { return cmp.Compare(a.Ref, b.Ref) })
	b, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return err
	}
	if err := durable.Replace(p.path, b, 0o600); err != nil {
		return fmt.Errorf("list of pinned images: %w", err)
	}
	return nil
}
