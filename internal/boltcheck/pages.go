package boltcheck

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// The parts of bbolt's file format (version 2) that say where something is. All
// numbers are in host byte order.
//
//	page    id u64, flags u16, count u16, overflow u32 (further pages), elements
//	branch  pos u32, key length u32, page u64; the key is at pos from here
//	leaf    flags u32, pos u32, key length u32, value length u32; key and value at
//	        pos from here
//	bucket  root page u64, sequence u64; root 0: a page follows, without others
//	meta    magic u32, version u32, page size u32, flags u32, root bucket,
//	        page of the free list u64 (all ones: none), pages u64, transaction u64,
//	        FNV-1a of the 56 bytes before
const (
	pageHeader    = 16
	elementSize   = 16
	bucketSize    = 16
	metaSize      = 64
	metaMagic     = 0xED0CDAED
	formatVersion = 2
	noFreelist    = ^uint64(0)

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10
	bucketLeaf   = 0x01
)

// pages looks at the pages of a database with read(2) alone, and fails where one
// says that something lies where it cannot, where a page is used twice, and where keys
// are out of order. bbolt finds that, too, but in goroutines of its own, in which a
// memory fault ends the process; and one that opens a database without a list of free
// pages goes on, with what the opener has given up, after the first thing found.
type pages struct {
	f    io.ReaderAt
	size int64 // bytes in a page
	end  uint64
	seen map[uint64]bool
}

var order = binary.NativeEndian

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", blockdev.ErrCorrupt, fmt.Sprintf(format, args...))
}

// lockedPages checks the pages of the database in a file.
func lockedPages(path string) error { return locked(path, checkFile) }

// locked looks at a database while bbolt's lock keeps others from writing to it.
func locked(path string, look func(*os.File) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() // and with it goes the lock
	for end := time.Now().Add(lockWait); ; time.Sleep(lockLook) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		if err == nil {
			return look(f)
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return &os.PathError{Op: "flock", Path: path, Err: err}
		}
		if time.Now().After(end) {
			return ErrInUse
		}
	}
}

func checkFile(f *os.File) error {
	fi, err := f.Stat()
	if err != nil || fi.Size() == 0 { // as a crash may leave a new one: bbolt sets it up
		return err
	}
	return checkReader(f, fi.Size())
}

// checkReader is checkFile for size bytes of f.
func checkReader(f io.ReaderAt, size int64) error {
	meta, err := readMeta(f)
	if err != nil {
		return err
	}
	return checkMeta(f, size, meta)
}

// checkMeta checks the pages that belong to a meta record.
func checkMeta(f io.ReaderAt, size int64, meta []byte) error {
	p := newPages(f, meta)
	if most := uint64(size / p.size); p.end > most {
		return corrupt("%d pages in a file that has room for %d", p.end, most)
	}
	var free []byte
	if id := order.Uint64(meta[32:]); id != noFreelist {
		var err error
		if free, err = p.freelist(id); err != nil {
			return err
		}
	}
	if err := p.tree(order.Uint64(meta[16:])); err != nil {
		return err
	}
	for ; len(free) > 0; free = free[8:] {
		if id := order.Uint64(free); p.seen[id] {
			return corrupt("page %d is in use, and the list of free pages has it", id)
		}
	}
	return nil
}

// newPages are those that belong to a meta record.
func newPages(f io.ReaderAt, meta []byte) *pages {
	return &pages{f: f, size: int64(order.Uint32(meta[8:])), end: order.Uint64(meta[40:]), seen: make(map[uint64]bool)}
}

// metaAt reads the meta record of the page at off; nil: there is none.
func metaAt(f io.ReaderAt, off int64) []byte {
	b := make([]byte, metaSize)
	if _, err := f.ReadAt(b, off+pageHeader); err != nil {
		return nil
	}
	sum := fnv.New64a()
	_, _ = sum.Write(b[:56]) // never fails
	size := order.Uint32(b[8:])
	if order.Uint32(b) != metaMagic || order.Uint32(b[4:]) != formatVersion || order.Uint64(b[56:]) != sum.Sum64() ||
		size < 1024 || size > 64<<10 {
		return nil
	}
	return b
}

// metaOf returns the meta record that a transaction has written; nil: it is not there,
// or not any more.
func metaOf(f io.ReaderAt, txid uint64, pageSize int64) []byte {
	for _, off := range []int64{0, pageSize} {
		if b := metaAt(f, off); b != nil && order.Uint64(b[48:]) == txid {
			return b
		}
	}
	return nil
}

// readMeta returns the newer meta record, as bbolt finds it.
func readMeta(f io.ReaderAt) ([]byte, error) {
	var best []byte
	at := func(off int64) []byte {
		b := metaAt(f, off)
		if b != nil && best == nil || b != nil && order.Uint64(b[48:]) > order.Uint64(best[48:]) {
			best = b
		}
		return b
	}
	if first := at(0); first != nil {
		at(int64(order.Uint32(first[8:])))
		return best, nil
	}
	// The other one is a page further, whatever a page is.
	for size := int64(1024); size <= 64<<10; size *= 2 {
		if b := at(size); b != nil && int64(order.Uint32(b[8:])) == size {
			return b, nil
		}
		best = nil
	}
	return nil, corrupt("no valid meta page")
}

// page reads a page with those that belong to it.
func (p *pages) page(id uint64) ([]byte, error) {
	if id < 2 || id >= p.end {
		return nil, corrupt("page %d of %d", id, p.end)
	}
	var head [pageHeader]byte
	if _, err := p.f.ReadAt(head[:], int64(id)*p.size); err != nil {
		return nil, p.readError(err)
	}
	n := uint64(order.Uint32(head[12:])) + 1
	if order.Uint64(head[:]) != id || n > p.end-id {
		return nil, corrupt("page %d says that it is page %d, with %d more", id, order.Uint64(head[:]), n-1)
	}
	for i := range n {
		if p.seen[id+i] {
			return nil, corrupt("page %d is used twice", id+i)
		}
		p.seen[id+i] = true
	}
	b := make([]byte, int64(n)*p.size)
	if _, err := p.f.ReadAt(b, int64(id)*p.size); err != nil {
		return nil, p.readError(err)
	}
	return b, nil
}

func (p *pages) readError(err error) error {
	if errors.Is(err, io.EOF) {
		return corrupt("the file is too short")
	}
	return err
}

// freelist checks the list of free pages, and returns their numbers.
func (p *pages) freelist(id uint64) ([]byte, error) {
	b, err := p.page(id)
	if err != nil {
		return nil, err
	}
	ids, count := b[pageHeader:], uint64(order.Uint16(b[10:]))
	if count == 0xffff { // more than that
		count, ids = order.Uint64(ids), ids[8:]
	}
	if order.Uint16(b[8:]) != freelistPage || count > uint64(len(ids)/8) {
		return nil, corrupt("page %d is not a list of free pages, or has %d entries", id, count)
	}
	for i := range count {
		if free := order.Uint64(ids[8*i:]); free < 2 || free >= p.end {
			return nil, corrupt("the list of free pages has page %d of %d", free, p.end)
		}
	}
	return ids[:8*count], nil
}

// tree checks the pages of a bucket, and of the buckets in it.
func (p *pages) tree(root uint64) error {
	roots := []uint64{root}
	for len(roots) > 0 {
		id := roots[len(roots)-1]
		roots = roots[:len(roots)-1]
		if _, err := p.below(id, nil, nil, &roots); err != nil {
			return err
		}
	}
	return nil
}

// below checks a page and those under it, whose keys begin with least and are less than
// end (nil: no bound), adds the buckets in them to roots, and returns the last key.
func (p *pages) below(id uint64, least, end []byte, roots *[]uint64) (last []byte, err error) {
	b, err := p.page(id)
	if err != nil {
		return nil, err
	}
	all, err := elements(b)
	if err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	last = least
	for i, e := range all {
		c := bytes.Compare(last, e.key)
		if last != nil && (c > 0 || (c == 0) != (i == 0)) || end != nil && bytes.Compare(e.key, end) >= 0 {
			return nil, corrupt("page %d: key %d is out of order", id, i)
		}
		last = e.key
		if order.Uint16(b[8:]) == leafPage {
			*roots = append(*roots, e.pages...)
			continue
		}
		most := end
		if i+1 < len(all) {
			most = all[i+1].key
		}
		if last, err = p.below(e.pages[0], e.key, most, roots); err != nil {
			return nil, err
		}
	}
	return last, nil
}

// element is one of a page, and the pages that it names: those of a branch, or the
// root of a bucket.
type element struct {
	key   []byte
	pages []uint64
}

// elements checks where those of a page lie.
func elements(b []byte) (all []element, err error) {
	if len(b) < pageHeader {
		return nil, corrupt("no room for a page")
	}
	flags, count := order.Uint16(b[8:]), int(order.Uint16(b[10:]))
	if flags != branchPage && flags != leafPage {
		return nil, corrupt("flags %#x", flags)
	}
	if flags == branchPage && count == 0 || count*elementSize > len(b)-pageHeader {
		return nil, corrupt("%d elements", count)
	}
	all = make([]element, 0, count)
	for i := range count {
		at := pageHeader + i*elementSize
		e := b[at : at+elementSize]
		pos, key, value := e, e[4:], []byte(nil)
		if flags == leafPage {
			pos, key, value = e[4:], e[8:], e[12:]
		}
		from := uint64(at) + uint64(order.Uint32(pos))
		mid := from + uint64(order.Uint32(key))
		to := mid
		if value != nil {
			to += uint64(order.Uint32(value))
		}
		if to > uint64(len(b)) {
			return nil, corrupt("element %d is beyond the page", i)
		}
		x := element{key: b[from:mid]}
		switch {
		case flags == branchPage:
			x.pages = []uint64{order.Uint64(e[8:])}
		case order.Uint32(e)&bucketLeaf != 0:
			if x.pages, err = bucket(b[mid:to]); err != nil {
				return nil, fmt.Errorf("bucket %d: %w", i, err)
			}
		}
		all = append(all, x)
	}
	return all, nil
}

// bucket checks the value that a bucket is, and returns the pages that it names.
func bucket(v []byte) (next []uint64, err error) {
	if len(v) < bucketSize {
		return nil, corrupt("%d bytes", len(v))
	}
	if root := order.Uint64(v); root != 0 {
		return []uint64{root}, nil
	}
	all, err := elements(v[bucketSize:])
	for _, e := range all {
		if len(e.pages) > 0 {
			return nil, corrupt("pages in a page that is within another one")
		}
	}
	return nil, err
}
