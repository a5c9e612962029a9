package fusefs

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// The table of pending requests, docs/formats.md: slots of slotSize bytes, all
// numbers in host byte order. The first is its header; each other one has the
// beginning of a request, as the kernel sent it, and is free if the request's
// length is zero.
const (
	pendingMagic = "SHOALRQ\x01"
	pendingUsed  = len(pendingMagic) // u32: how many slots behind the header were ever used
	// slotSize has room for a whole READ, for a LOOKUP of a diff, and for all else
	// that the kernel asks of a flat directory of read-only files.
	slotSize = 128
	// pendingSlots are enough for all requests that the kernel gives out, maxBackground
	// and those that somebody waits for; a part of the format.
	pendingSlots = 1<<16 + 8<<10
	pendingSize  = (1 + pendingSlots) * slotSize
)

// NewPending makes an empty table for Options.Pending: a memfd, of which only
// what is used takes memory.
func NewPending() (*os.File, error) {
	fd, err := unix.MemfdCreate("shoal-fuse-pending", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "fuse-pending")
	err = unix.Ftruncate(fd, pendingSize)
	if err == nil {
		// A process that has it mapped would be killed if it became shorter.
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err == nil {
		_, err = f.WriteAt([]byte(pendingMagic), 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("table of pending FUSE requests: %w", err)
	}
	return f, nil
}

// CheckPending says whether New will take f as Options.Pending; an error wraps
// blockdev.ErrCorrupt.
func CheckPending(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	var head [pendingUsed + 4]byte
	if fi.Size() == pendingSize {
		_, err = f.ReadAt(head[:], 0)
	}
	used := binary.NativeEndian.Uint32(head[pendingUsed:])
	if err != nil || string(head[:pendingUsed]) != pendingMagic || used > pendingSlots {
		return fmt.Errorf("the table of pending FUSE requests is damaged, or of another version: %w", blockdev.ErrCorrupt)
	}
	return nil
}

// slot holds one request, from before the kernel considers it read until it is
// answered. So the process can be killed at any moment and the table has every
// request that it owes an answer; answering one that has been answered does
// nothing, since the kernel never uses a number twice.
type slot []byte

func (s slot) length() *uint32 { return (*uint32)(unsafe.Pointer(unsafe.SliceData(s))) }

// clear says that the request needs no answer any more.
func (s slot) clear() { atomic.StoreUint32(s.length(), 0) }

// pending is the table. Without a file it has slots that die with the process.
type pending struct {
	mem []byte // of the file; nil: none
	// left are the requests of earlier servers.
	left []slot

	mu   sync.Mutex
	free []slot
	used uint32
}

// openPending maps the table in f, which may be nil; close undoes that.
func openPending(f *os.File) (*pending, error) {
	p := &pending{}
	if f == nil {
		return p, nil
	}
	if err := CheckPending(f); err != nil {
		return nil, err
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var merr error
	err = conn.Control(func(fd uintptr) {
		p.mem, merr = unix.Mmap(int(fd), 0, pendingSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	})
	if err == nil {
		err = merr
	}
	if err != nil {
		return nil, fmt.Errorf("map the table of pending FUSE requests: %w", err)
	}
	p.used = binary.NativeEndian.Uint32(p.mem[pendingUsed:])
	for i := range p.used {
		if s := p.at(i); *s.length() != 0 {
			p.left = append(p.left, s)
		} else {
			p.free = append(p.free, s)
		}
	}
	return p, nil
}

// at returns slot i of the file.
func (p *pending) at(i uint32) slot {
	from := (1 + int(i)) * slotSize
	return slot(p.mem[from : from+slotSize : from+slotSize])
}

// take returns a free slot, nil if there is none.
func (p *pending) take() slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	if last := len(p.free) - 1; last >= 0 {
		s := p.free[last]
		p.free = p.free[:last]
		return s
	}
	if p.used == pendingSlots {
		return nil
	}
	p.used++
	if p.mem == nil {
		return make(slot, slotSize)
	}
	binary.NativeEndian.PutUint32(p.mem[pendingUsed:], p.used)
	s := p.at(p.used - 1)
	// The kernel cannot bring in a page for a process that is being killed, and
	// fails the request that it was about to copy there.
	s.clear()
	return s
}

// give clears a slot and takes it back.
func (p *pending) give(s slot) {
	s.clear()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, s)
}

func (p *pending) close() error {
	if p.mem == nil {
		return nil
	}
	return unix.Munmap(p.mem)
}
