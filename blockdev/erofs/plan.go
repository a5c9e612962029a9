package erofs

import (
	"fmt"
	"slices"
	"strings"
)

// maxTimes bounds the table that finds the most frequent mtime. Times that turn
// up after it is full are not counted, which costs a few bytes and no more.
const maxTimes = 1 << 16

// dirent is an entry of a directory's sorted list.
type dirent struct {
	name string
	node int32
}

// node is an inode on its way into the image.
type node struct {
	in     *Inode
	ents   []dirent // of a directory: sorted, with "." and ".."
	parent int32    // where it was found first
	nlink  uint32

	// Set by place:
	compact   bool
	layout    uint8
	chunkBits uint8 // log2 of the chunk, in blocks
	tail      int32 // bytes that follow the inode (layoutInline)
	xsize     int32 // bytes of attributes behind the inode
	size      int64 // i_size
	chunks    int64 // entries of the chunk map
	pos       int64 // of the inode, bytes from the image's start
	data      int64 // of the first block in the data area, likewise
	dataLen   int64 // bytes there; the last block is padded
}

func (n *node) typ() uint32 { return n.in.Mode & modeType }

// isize is the length of the on-disk inode in bytes.
func (n *node) isize() int64 {
	if n.compact {
		return sizeCompact
	}
	return sizeExtended
}

// image is a tree with every byte's place.
type image struct {
	blkBits  uint8
	blk      int64
	diffSize int64
	nodes    []node // in the order of their nids; 0 is the root
	shared   sharedXattrs

	buildSec  int64
	buildNsec uint32
	sharedPos int64 // bytes; a multiple of blk
	total     int64 // bytes; a multiple of blk
}

type mtime struct {
	sec  int64
	nsec uint32
}

// newImage checks the tree and lists its inodes: the root, then for each
// directory, parents first, all its entries in sorted order. So what one `ls -l`
// reads lies together.
func newImage(root *Inode, diffSize int64, blkBits uint8) (*image, error) {
	img := &image{blkBits: blkBits, blk: 1 << blkBits, diffSize: diffSize}
	if diffSize < 0 {
		return nil, corrupt("diff of %d bytes", diffSize)
	}
	if diffSize > MaxDiffSize {
		return nil, unsupported("diff of %d bytes, at most %d can be addressed", diffSize, int64(MaxDiffSize))
	}
	if root == nil || root.Mode&modeType != modeDir {
		return nil, corrupt("the root is not a directory")
	}
	seen := make(map[*Inode]int32)
	times := make(map[mtime]int)
	add := func(in *Inode, parent int32) (int32, error) {
		if err := in.check(diffSize, img.blk); err != nil {
			return 0, err
		}
		if err := checkXattrs(in.Xattrs); err != nil {
			return 0, err
		}
		// Each inode takes 32 bytes at least, so this bounds the table as well.
		if len(img.nodes) >= MaxSize/sizeCompact {
			return 0, unsupported("more than %d inodes", len(img.nodes))
		}
		i := int32(len(img.nodes)) // bounded just above
		seen[in] = i
		img.shared.count(in.Xattrs)
		t := mtime{in.MtimeSec, in.MtimeNsec}
		if n, ok := times[t]; ok || len(times) < maxTimes {
			times[t] = n + 1
		}
		img.nodes = append(img.nodes, node{in: in, parent: parent, nlink: 1})
		return i, nil
	}
	if _, err := add(root, 0); err != nil {
		return nil, fmt.Errorf("/: %w", err)
	}
	for todo := []int32{0}; len(todo) > 0; {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		first := len(todo)
		ents := make([]dirent, 0, len(img.nodes[d].in.Children)+2)
		ents = append(ents, dirent{".", d}, dirent{"..", img.nodes[d].parent})
		img.nodes[d].nlink = 2
		for _, c := range sortedChildren(img.nodes[d].in.Children) {
			fail := func(err error) error { return fmt.Errorf("%s: %w", img.path(d, c.Name), err) }
			if err := checkName(c.Name); err != nil {
				return nil, fail(err)
			}
			if c.Name == ents[len(ents)-1].name {
				return nil, fail(corrupt("the name occurs twice"))
			}
			if c.Inode == nil {
				return nil, fail(corrupt("name without an inode"))
			}
			i, again := seen[c.Inode]
			switch isDir := c.Inode.Mode&modeType == modeDir; {
			case again && isDir:
				return nil, fail(corrupt("directory with two names"))
			case again:
				img.nodes[i].nlink++
			default:
				var err error
				if i, err = add(c.Inode, d); err != nil {
					return nil, fail(err)
				}
				if isDir {
					img.nodes[d].nlink++
					todo = append(todo, i)
				}
			}
			ents = append(ents, dirent{c.Name, i})
		}
		slices.Reverse(todo[first:])
		// "." and ".." are sorted among the names: "-" comes before them.
		slices.SortFunc(ents, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
		img.nodes[d].ents = ents
	}
	best := mtime{root.MtimeSec, root.MtimeNsec}
	for t, n := range times {
		m := times[best]
		if n > m || n == m && (t.sec < best.sec || t.sec == best.sec && t.nsec < best.nsec) {
			best = t
		}
	}
	img.buildSec, img.buildNsec = best.sec, best.nsec
	if err := img.shared.place(); err != nil {
		return nil, err
	}
	return img, img.place()
}

// sortedChildren returns c by name; it copies only what is out of order.
func sortedChildren(c []Dirent) []Dirent {
	cmp := func(a, b Dirent) int { return strings.Compare(a.Name, b.Name) }
	if slices.IsSortedFunc(c, cmp) {
		return c
	}
	c = slices.Clone(c)
	slices.SortFunc(c, cmp)
	return c
}

// path names the entry of directory d for an error message. Parents are looked
// up the slow way: it is done once.
func (img *image) path(d int32, name string) string {
	parts := []string{fmt.Sprintf("%.300q", name)}
	for d != 0 && len(parts) < 50 {
		p := img.nodes[d].parent
		for _, c := range img.nodes[p].in.Children {
			if c.Inode == img.nodes[d].in {
				parts = append(parts, c.Name)
				break
			}
		}
		d = p
	}
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/")
}
