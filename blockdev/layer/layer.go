package layer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/background"
	"github.com/shoalfs/shoal/blockdev/erofs"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/defaults"
)

// Put takes a chunk or a piece of the header stream: 1 to blockdev.MaxChunk
// bytes with the digest d. It is called from several goroutines, with the same
// data more than once if the layer has it more than once. data is valid until
// it returns. Its error ends the Build.
type Put func(ctx context.Context, d blockdev.Digest, data []byte) error

// Limits that no Options change.
const (
	// MaxHeader bounds, in bytes, all that stands before the content of one
	// entry: PAX and GNU extension headers, the header, a sparse map.
	MaxHeader = 4 << 20
	// MaxPath is the length, in bytes, of the longest path: Linux' PATH_MAX
	// without the NUL.
	MaxPath = 4095
	// MaxName is the length, in bytes, of the longest name in a directory.
	MaxName = 255
	// maxLinks bounds the symlinks followed for one path, as containerd does.
	maxLinks = 255
)

// BuilderVersion is the version of what Build makes of a diff, which every index
// carries. It goes up whenever the metadata or the implied directories of any diff
// change: by a change here, in package erofs, or in archive/tar of a new Go. Nodes and
// supernodes that differ in it believe each other, and a node that proves an index of
// another builder shows its own tree from then on (package proof). 0 is that of all
// indexes from before there was such a version.
//
// Where chunks are cut, and what is masked, belongs to the version of the index format:
// two builders that differ in that cannot prove each other's indexes.
const BuilderVersion = 0

// Options bound what a Build may use. A zero field means its default.
type Options struct {
	// Workers is how many goroutines hash chunks and call Put; default
	// GOMAXPROCS.
	Workers int
	// MaxEntries bounds tar entries, inodes and extents together; default 4
	// million.
	MaxEntries int
	// MaxChunks bounds chunks and pieces together; default what an encoded index has room
	// for at 34 bytes each, some 240 GiB of content.
	MaxChunks int
	// MaxMetadata bounds the names, link targets, extended attributes and
	// implied paths of the layer together, in bytes; default 256 MiB.
	MaxMetadata int64
	// MaxInline bounds the content, in bytes, of sparse files whose data lies in
	// the tar so that no 512-byte blocks address it; it is kept in the metadata.
	// Default 64 MiB.
	MaxInline int64
	// Background leaves the processors to all other programs that want them (package
	// background). Put should then do nothing that others wait for.
	Background bool
}

func (o *Options) setDefaults() {
	defaults.Positive(&o.Workers, runtime.GOMAXPROCS(0))
	defaults.Positive(&o.MaxEntries, 4_000_000)
	defaults.Positive(&o.MaxChunks, index.MaxEncoded/34)
	defaults.Positive(&o.MaxMetadata, 256<<20)
	defaults.Positive(&o.MaxInline, 64<<20)
}

// Build reads the diff r to its end, once, and returns its index, having called
// put for every chunk and every piece of the header stream.
//
// The error wraps blockdev.ErrCorrupt (truncated, bad checksum, contradicting
// headers), blockdev.ErrUnsupported (beyond a limit, or what containerd would
// not unpack either), the error of r or put, or the context's; it names the
// entry. Build starts goroutines and waits for all of them, so it returns only
// after a Read or Put in progress has: a caller that cancels ctx makes r return, too.
func Build(ctx context.Context, r io.Reader, put Put, o Options) (*blockdev.Index, error) {
	o.setDefaults()
	group, gctx := errgroup.WithContext(ctx)
	in := newInput(gctx)
	out, err := newOutput(gctx, put, o)
	if err != nil {
		return nil, fmt.Errorf("building the index of a layer: %w", err)
	}
	s := &scanner{in: in, out: out, tree: newTree(o), maxInline: o.MaxInline}
	var diffID blockdev.Digest
	start := group.Go
	if o.Background {
		start = func(f func() error) {
			group.Go(func() error {
				background.Goroutine()
				return f()
			})
		}
	}

	group.Go(func() error { return in.read(r) })
	start(func() error {
		diffID = in.hash()
		return nil
	})
	for range o.Workers {
		start(out.work)
	}
	start(func() error {
		defer close(out.jobs) // the workers end when they have put what is there
		if err := s.run(); err != nil {
			return err
		}
		return out.flush()
	})
	if err := group.Wait(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, fmt.Errorf("building the index of a layer: %w", cause)
		}
		return nil, fmt.Errorf("building the index of a layer: %w", err)
	}

	var meta bytes.Buffer
	if err := erofs.Write(&meta, s.tree.root, in.offset); err != nil {
		return nil, fmt.Errorf("building the index of layer %v: %w", diffID, err)
	}
	return &blockdev.Index{
		Builder:  BuilderVersion,
		DiffID:   diffID,
		DiffSize: in.offset,
		Meta:     meta.Bytes(),
		Chunks:   out.chunks,
		Headers:  out.pieces,
		Implied:  s.tree.implied(),
	}, nil
}

// corrupt and unsupported make errors of the two kinds that the input causes.
func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{blockdev.ErrCorrupt}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{blockdev.ErrUnsupported}, args...)...)
}
