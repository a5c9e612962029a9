package layer

import (
	"slices"
	"strings"

	"github.com/shoalfs/shoal/blockdev/erofs"
)

// File types of st_mode.
const (
	modeType    = 0o170000
	modeFIFO    = 0o010000
	modeChar    = 0o020000
	modeDir     = 0o040000
	modeBlock   = 0o060000
	modeRegular = 0o100000
	modeSymlink = 0o120000
	modeSetgid  = 0o2000
	modePerm    = 0o7777
)

// smallDir is how many entries a directory finds by looking at each.
const smallDir = 16

// tree is a file system in memory, with the operations that unpacking needs.
type tree struct {
	root *erofs.Inode
	dirs map[*erofs.Inode]*dir

	count, maxCount int   // entries, inodes, extents
	bytes, maxBytes int64 // names, targets, attributes, implied paths

	// times are the modification times that containerd sets when all entries
	// are there, by name, for what a name means may have changed by then.
	times    []dirTime
	replaced bool // some name means something else than it did once

	// The directory that the last entry was in: most are in the same.
	lastPath string
	lastDir  *erofs.Inode
}

type dirTime struct {
	name string
	sec  int64
	nsec uint32
}

// dir is what a directory has besides its inode.
type dir struct {
	index   map[string]int32 // name to place in Children; nil in small ones
	path    string           // clean, without leading slash; of implied ones only
	implied bool             // made for its children, has had no entry
}

func newTree(o Options) *tree {
	t := &tree{
		root:     &erofs.Inode{Mode: modeDir | 0o755},
		dirs:     make(map[*erofs.Inode]*dir),
		maxCount: o.MaxEntries,
		maxBytes: o.MaxMetadata,
	}
	t.dirs[t.root] = new(dir)
	return t
}

// charge counts against the limits.
func (t *tree) charge(count, bytes int) error {
	if t.count += count; t.count > t.maxCount {
		return unsupported("more than %d entries, inodes and extents in one layer", t.maxCount)
	}
	if t.bytes += int64(bytes); t.bytes > t.maxBytes {
		return unsupported("more than %d bytes of names, link targets and attributes in one layer", t.maxBytes)
	}
	return nil
}

func isDir(in *erofs.Inode) bool     { return in != nil && in.Mode&modeType == modeDir }
func isSymlink(in *erofs.Inode) bool { return in != nil && in.Mode&modeType == modeSymlink }

// place returns where name stands in the children of d, or -1.
func (t *tree) place(d *erofs.Inode, name string) int {
	if idx := t.dirs[d].index; idx != nil {
		if i, ok := idx[name]; ok {
			return int(i)
		}
		return -1
	}
	return slices.IndexFunc(d.Children, func(c erofs.Dirent) bool { return c.Name == name })
}

// lookup returns nil if d has no such name.
func (t *tree) lookup(d *erofs.Inode, name string) *erofs.Inode {
	if i := t.place(d, name); i >= 0 {
		return d.Children[i].Inode
	}
	return nil
}

// add gives in the name in d, which must be free there.
func (t *tree) add(d *erofs.Inode, name string, in *erofs.Inode) error {
	if len(name) > MaxName {
		return unsupported("name of %d bytes, at most %d are possible", len(name), MaxName)
	}
	if err := t.charge(1, len(name)); err != nil {
		return err
	}
	// The name must not keep the whole path in memory that it was cut from.
	name = strings.Clone(name)
	d.Children = append(d.Children, erofs.Dirent{Name: name, Inode: in})
	info := t.dirs[d]
	switch {
	case info.index != nil:
		info.index[name] = int32(len(d.Children) - 1) // bounded by maxCount
	case len(d.Children) > smallDir:
		info.index = make(map[string]int32, 2*smallDir)
		for i, c := range d.Children {
			info.index[c.Name] = int32(i) // bounded by maxCount
		}
	}
	return nil
}

// create makes an inode as the kernel does in a directory: it belongs to root,
// or to the directory's group where that is inherited, as are default ACLs.
func (t *tree) create(d *erofs.Inode, name string, mode uint32) (*erofs.Inode, error) {
	in := &erofs.Inode{Mode: mode}
	if d.Mode&modeSetgid != 0 {
		in.GID = d.GID
	}
	if err := t.add(d, name, in); err != nil {
		return nil, err
	}
	if mode&modeType == modeDir {
		t.dirs[in] = new(dir)
	}
	return in, t.charge(0, inheritACL(d, in))
}

// remove takes a name and all below it out of the tree.
func (t *tree) remove(d *erofs.Inode, name string) {
	i := t.place(d, name)
	if i < 0 {
		return
	}
	t.replaced, t.lastDir = true, nil
	gone := d.Children[i].Inode
	last := len(d.Children) - 1
	d.Children[i] = d.Children[last]
	d.Children[last] = erofs.Dirent{}
	d.Children = d.Children[:last]
	if idx := t.dirs[d].index; idx != nil {
		delete(idx, name)
		if i < last {
			idx[d.Children[i].Name] = int32(i) // bounded by maxCount
		}
	}
	for todo := []*erofs.Inode{gone}; len(todo) > 0; {
		in := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if isDir(in) {
			for _, c := range in.Children {
				todo = append(todo, c.Inode)
			}
			delete(t.dirs, in)
		}
	}
}

// step is one component of a resolved path; in is nil where there is nothing.
type step struct {
	name string
	in   *erofs.Inode
}

// resolve follows path from the root, symlinks in it and at its end included,
// and never leaves the root. What does not exist is taken as it is written. The
// result has no ".." and no symlinks.
func (t *tree) resolve(path string) ([]step, error) {
	var steps []step
	links, dots := 0, false
	length := 0
	rest := path
	for rest != "" {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			dots = true
			if len(steps) > 0 {
				length -= len(steps[len(steps)-1].name) + 1
				steps = steps[:len(steps)-1]
			}
			continue
		}
		at := t.root
		if len(steps) > 0 {
			at = steps[len(steps)-1].in
		}
		var in *erofs.Inode
		if at != nil {
			if !isDir(at) {
				return nil, unsupported("%q is not a directory", join(steps))
			}
			in = t.lookup(at, name)
		}
		if isSymlink(in) {
			if links++; links > maxLinks {
				return nil, unsupported("more than %d symlinks on one path", maxLinks)
			}
			target := string(in.Inline)
			if strings.HasPrefix(target, "/") {
				steps, length = steps[:0], 0
			}
			rest = target + "/" + rest
			continue
		}
		if length += len(name) + 1; length > MaxPath {
			return nil, unsupported("path of more than %d bytes", MaxPath)
		}
		steps = append(steps, step{name, in})
	}
	if links > 1 && dots {
		// containerd goes up lexically, before it has followed all links.
		return nil, unsupported("path over %d symlinks, with %q in it", links, "..")
	}
	return steps, nil
}

func join(steps []step) string {
	var b strings.Builder
	for i, s := range steps {
		if i > 0 {
			b.WriteByte('/')
		}
		b.WriteString(s.name)
	}
	return b.String()
}

// parent resolves path to a directory and makes what is missing of it.
func (t *tree) parent(path string) (*erofs.Inode, error) {
	if t.lastDir != nil && t.lastPath == path {
		return t.lastDir, nil
	}
	steps, err := t.resolve(path)
	if err != nil {
		return nil, err
	}
	d := t.root
	for i, s := range steps {
		in := s.in
		if in == nil {
			if in, err = t.create(d, s.name, modeDir|0o755); err != nil {
				return nil, err
			}
			info := t.dirs[in]
			info.implied, info.path = true, join(steps[:i+1])
			if err := t.charge(0, len(info.path)); err != nil {
				return nil, err
			}
			changeMode(in, 0o755)
		}
		if !isDir(in) {
			return nil, unsupported("%q is not a directory", join(steps[:i+1]))
		}
		d = in
	}
	t.lastPath, t.lastDir = path, d
	return d, nil
}

// implied lists the directories that had no entry of their own.
func (t *tree) implied() []string {
	var paths []string
	for _, d := range t.dirs {
		if d.implied {
			paths = append(paths, d.path)
		}
	}
	slices.Sort(paths)
	return paths
}
