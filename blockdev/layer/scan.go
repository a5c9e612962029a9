package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"

	"github.com/shoalfs/shoal/blockdev/erofs"
)

const tarBlock = 512

// scanner walks over the diff. It tells content from all else and builds the
// tree.
type scanner struct {
	in        *input
	out       *output
	tree      *tree
	maxInline int64
	inlined   int64 // bytes kept in inodes so far

	head    []byte // what stood before the content of the current entry
	headErr error  // why Read stopped, other than the end of the diff
	last    string // name of the entry before, for errors
}

var errHeadTooLong = fmt.Errorf("more than %d bytes of headers before one entry", MaxHeader)

// Read gives archive/tar the headers of an entry. It reads blocks as it needs
// them and no further, so what it has read is what is to be masked, and the
// content starts where it stopped.
func (s *scanner) Read(p []byte) (int, error) {
	if len(s.head)+len(p) > MaxHeader {
		s.headErr = unsupported("%w", errHeadTooLong)
		return 0, s.headErr
	}
	b, err := s.in.next(int64(len(p)))
	if err != nil {
		if !ended(err) {
			s.headErr = err
		}
		return 0, err
	}
	n := copy(p, b)
	s.head = append(s.head, b...)
	if err := s.out.masked(b); err != nil {
		s.headErr = err
		return 0, err
	}
	s.in.consume(n)
	return n, nil
}

// run reads the whole diff.
func (s *scanner) run() error {
	for {
		start := s.in.offset
		s.head, s.headErr = s.head[:0], nil
		hdr, err := tar.NewReader(s).Next()
		switch {
		case s.headErr != nil:
			return s.where(start, s.headErr)
		case err == io.EOF:
			if err := s.tree.finish(); err != nil {
				return err
			}
			return s.trailer()
		case errors.Is(err, tar.ErrFieldTooLong):
			return s.where(start, unsupported("%w", err))
		case err != nil && !errors.Is(err, tar.ErrInsecurePath): // the tree judges paths
			return s.where(start, corrupt("%w", err))
		}
		if err := s.entry(hdr); err != nil {
			return fmt.Errorf("entry %.200q: %w", hdr.Name, err)
		}
		s.last = hdr.Name
	}
}

func (s *scanner) where(start int64, err error) error {
	if s.last == "" {
		return fmt.Errorf("tar header at byte %d: %w", start, err)
	}
	return fmt.Errorf("tar header at byte %d, after entry %.200q: %w", start, s.last, err)
}

// entry takes one entry with its content and padding.
func (s *scanner) entry(hdr *tar.Header) error {
	parts, size, err := dataOf(hdr, s.head)
	if err != nil {
		return err
	}
	in, err := s.tree.apply(hdr)
	if err != nil {
		return err
	}
	if in == nil { // whiteouts and the like: what data they have is no file's
		if err := s.skip(size); err != nil {
			return err
		}
	} else if err := s.file(in, hdr.Size, parts, size); err != nil {
		return err
	}
	// Headers are whole blocks, but for a global one: that ends with its records.
	if err := s.skip(-(int64(len(s.head)) + size) & (tarBlock - 1)); err != nil && !errors.Is(err, errTruncated) {
		return err
	}
	// A tar that ends in the padding of its last entry is accepted everywhere.
	// Only a sparse file may need that padding as the zeros which it stands for.
	if in != nil && len(in.Extents) > 0 {
		if e := in.Extents[len(in.Extents)-1]; e.DiffOffset+e.Length > s.in.offset {
			return unsupported("sparse file at the end of a tar that lacks its padding")
		}
	}
	return nil
}

// file takes the content of a regular file: size bytes in the diff, which parts
// place in the file (nil: as they are).
func (s *scanner) file(in *erofs.Inode, realSize int64, parts []part, size int64) error {
	in.Size = realSize
	capture := []byte(nil)
	if parts == nil {
		if size > 0 {
			in.Extents = []erofs.Extent{{DiffOffset: s.in.offset, Length: size}}
		}
	} else if ext, ok := extents(parts, s.in.offset, realSize); ok {
		if err := s.tree.charge(len(ext), 0); err != nil {
			return err
		}
		in.Extents = ext
	} else {
		if realSize > s.maxInline-s.inlined {
			return unsupported("sparse file of %d bytes whose data lies across blocks; at most %d such bytes a layer", realSize, s.maxInline)
		}
		s.inlined += realSize
		in.Inline = make([]byte, realSize) // bounded by maxInline
		capture = in.Inline
	}
	if size == 0 {
		return nil
	}
	if err := s.out.begin(size); err != nil {
		return err
	}
	for left := size; left > 0; {
		b, err := s.in.next(left)
		if err != nil {
			return truncated(err, left, size)
		}
		if capture != nil {
			parts = place(capture, parts, b)
		}
		if err := s.out.content(b); err != nil {
			return err
		}
		left -= int64(len(b))
		s.in.consume(len(b))
	}
	return s.out.end()
}

// skip masks n bytes.
func (s *scanner) skip(n int64) error {
	for left := n; left > 0; {
		b, err := s.in.next(left)
		if err != nil {
			return truncated(err, left, n)
		}
		if err := s.out.masked(b); err != nil {
			return err
		}
		left -= int64(len(b))
		s.in.consume(len(b))
	}
	return nil
}

// trailer masks what stands behind the end of the archive.
func (s *scanner) trailer() error {
	for {
		b, err := s.in.next(inputBlock)
		if ended(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.out.masked(b); err != nil {
			return err
		}
		s.in.consume(len(b))
	}
}

var errTruncated = errors.New("the stream ends too early")

// truncated explains the end of the diff, or passes on any other error.
func truncated(err error, left, size int64) error {
	if !ended(err) {
		return err
	}
	return corrupt("%w: %d of its %d bytes are missing", errTruncated, left, size)
}
