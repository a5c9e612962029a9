package fusefs

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// maxOutData is more than the largest fixed-size part of any answer.
const maxOutData = 512

// worker is what one loop goroutine needs to answer requests.
type worker struct {
	s    *Server
	slot slot   // of the request that is read next, or worked on
	rest []byte // behind the first slotSize bytes, the part of a request that no slot has room for
	out  []byte // for answers of go-fuse
	pipe *pipe  // nil: there are no more pipes
}

func newWorker(s *Server) *worker {
	w := &worker{s: s, slot: s.pending.take(), rest: make([]byte, minReadBuffer), out: make([]byte, 16<<10), pipe: newPipe()}
	if w.slot == nil {
		w.slot = make(slot, slotSize) // dies with the process, as all of them do without a table
	}
	// The kernel cannot bring in a page for a process that is being killed, and
	// fails the request that it was about to copy there.
	for i := range w.rest {
		w.rest[i] = 1
	}
	return w
}

func (w *worker) close() {
	if w.pipe != nil {
		w.pipe.close()
	}
}

// receive reads a request, its beginning into the slot. It does not wait.
func (w *worker) receive() (int, unix.Errno) {
	rest := w.rest[slotSize:]
	iov := [2]unix.Iovec{{Base: &w.slot[0], Len: slotSize}, {Base: &rest[0], Len: uint64(len(rest))}}
	n, _, errno := unix.Syscall(unix.SYS_READV, uintptr(w.s.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
	return int(n), errno
}

// request is what receive has read, in one piece.
func (w *worker) request(n int) []byte {
	if n <= slotSize {
		return w.slot[:n]
	}
	copy(w.rest, w.slot)
	return w.rest[:n]
}

// handle answers one request, or passes it on to a goroutine that answers it.
func (w *worker) handle(ctx context.Context, req []byte) {
	s := w.s
	h, ok := parseHeader(req)
	if !ok {
		s.opts.Log.Error("the kernel sent a damaged request; it gets no answer", "bytes", len(req))
		return
	}
	switch h.opcode {
	case opRead:
		if r, ok := parseRead(h, req); ok {
			w.read(ctx, r)
		} else {
			s.fail(h.unique, unix.EINVAL)
		}
	case opInterrupt:
		// Refused for good: the kernel sends no more of them. See doc.go.
		s.fail(h.unique, unix.ENOSYS)
	case opInit:
		out, err := s.negotiate(req)
		if err != nil {
			s.opts.Log.Error("cannot agree with the kernel on a FUSE protocol", "error", err)
			s.fail(h.unique, unix.EIO)
			return
		}
		s.write(out)
		s.agree(slices.Concat(req, out))
	default:
		w.delegate(h, req)
	}
}

// delegate lets go-fuse answer.
func (w *worker) delegate(h inHeader, req []byte) {
	s := w.s
	if need := outHeaderSize + maxOutData + listSize(h, req); need > len(w.out) {
		w.out = make([]byte, need)
	}
	s.protocol.RLock()
	n, st := s.ps.HandleRequest([][]byte{req}, [][]byte{w.out})
	s.protocol.RUnlock()
	switch {
	case st != fuse.OK:
		s.fail(h.unique, unix.Errno(st))
	case n > 0: // FORGET, for one, has no answer
		s.write(w.out[:n])
	}
}

// listSize returns how many bytes of payload an answer may have.
func listSize(h inHeader, req []byte) int {
	if h.opcode != opReaddir {
		return 0
	}
	r, ok := parseRead(h, req) // the same structure
	if !ok || r.size > MaxRead {
		return 0 // go-fuse refuses it
	}
	return int(r.size)
}

// read answers what is local and hands the rest over. The answer always has all
// the bytes that the kernel asked for, up to the file's length: EROFS takes what
// is missing from an answer for zeros.
func (w *worker) read(ctx context.Context, r readIn) {
	s, began := w.s, time.Now()
	id, f, ok := s.nodes.byNode(r.node)
	if !ok || handle(id) != r.handle {
		s.fail(r.unique, unix.ESTALE)
		return
	}
	length := fileLength(f.Size())
	switch {
	case r.size > MaxRead:
		s.fail(r.unique, unix.EINVAL)
		return
	case r.off >= length:
		s.fail(r.unique, 0) // the end of the file
		return
	}
	n := int(min(int64(r.size), length-r.off))
	if w.readLocal(f, r, n) {
		s.opts.Observe(blockdev.FromLocal, time.Since(began))
		return
	}
	next := s.pending.take()
	if next == nil {
		s.failRead(id, r, errLineFull)
		return
	}
	deadline, second := s.tries.deadline(id, r.off, began, began.Add(s.opts.ReadTimeout))
	err := s.slow.add(ctx, slowRead{readIn: r, slot: w.slot, id: id, file: f, n: n, deadline: deadline, second: second, began: began})
	if err != nil && !errors.Is(err, errStopped) {
		s.pending.give(next)
		s.failRead(id, r, err)
		return
	}
	w.slot = next // that of the request belongs to the goroutine that answers it, or stays for the next server
}

// readLocal answers a read of which all bytes are here, and reports whether it has. If
// they cannot be read, then Read is to find out why, and may know where else they are.
func (w *worker) readLocal(f File, r readIn, n int) bool {
	local, settled := f.Local(r.off, n)
	if !settled || !w.splice(local, r, n) {
		b := w.s.buffers.get(n)
		defer w.s.buffers.put(b)
		if !f.ReadLocal(b.payload(n), r.off) {
			return false
		}
		w.s.answer(r.unique, b, n)
	}
	if settled { // the file's own sync drops the rest
		forget(local, r.off, n)
	}
	return true
}

// splice answers through the pipe, if it can.
func (w *worker) splice(local *os.File, r readIn, n int) bool {
	if w.pipe == nil || n < spliceMin || n > w.pipe.most {
		return false
	}
	answered, usable := w.pipe.send(w.s.fd, r.unique, local, r.off, n)
	if !usable {
		w.pipe.close()
		w.pipe = newPipe()
	}
	return answered
}

// forget drops the pages of a range that has been answered: the kernel has its
// bytes in EROFS's page cache now. The page in which the range begins is done
// too (the range before has had its other part); the one in which it ends is
// what comes next.
func forget(local *os.File, off int64, n int) {
	conn, err := local.SyscallConn()
	if err != nil {
		return // closed
	}
	from := off &^ int64(os.Getpagesize()-1) // the kernel's pages, which arm64 has with 64 KiB, too
	_ = conn.Control(func(fd uintptr) {
		// Advice: nothing depends on it.
		_ = unix.Fadvise(int(fd), from, off+int64(n)-from, unix.FADV_DONTNEED)
	})
}

// answer sends a payload of n bytes.
func (s *Server) answer(unique uint64, b *buffer, n int) {
	a := b.answer(n)
	putOutHeader(a, unique, n, 0)
	s.write(a)
}

// fail answers with an error, or with nothing if errno is 0.
func (s *Server) fail(unique uint64, errno unix.Errno) {
	var b [outHeaderSize]byte
	putOutHeader(b[:], unique, 0, errno)
	s.write(b[:])
}

// failRead answers a read with EIO and says why in the log.
func (s *Server) failRead(id blockdev.Digest, r readIn, err error) {
	s.fail(r.unique, unix.EIO)
	s.failed.Add(1)
	s.opts.Failed(id, err)
	others, ok := s.failures.next(time.Now())
	if !ok {
		return
	}
	attrs := append(s.opts.Describe(id), "diff", id, "offset", r.off, "bytes", r.size, "error", err)
	if others > 0 {
		attrs = append(attrs, "others", others)
	}
	s.opts.Log.Error("read failed, the process gets EIO", attrs...)
}

// failureLog bounds the lines about failed reads: a source that is down fails
// very many.
type failureLog struct {
	mu     sync.Mutex
	second int64 // Unix time
	lines  int   // in that second
	others int   // failed reads without a line since the last one
}

// maxFailureLines is how many lines there are in a second.
const maxFailureLines = 16

// next says whether there is to be a line, and for how many reads before it there
// was none.
func (l *failureLog) next(now time.Time) (others int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := now.Unix(); s != l.second {
		l.second, l.lines = s, 0
	}
	if l.lines == maxFailureLines {
		l.others++
		return 0, false
	}
	l.lines++
	others, l.others = l.others, 0
	return others, true
}

// write sends one answer, as it must be, in one go.
func (s *Server) write(b []byte) {
	for {
		_, err := unix.Write(s.fd, b)
		switch err {
		case unix.EINTR:
			continue
		case nil, unix.ENOENT, unix.ENODEV:
			// Sent; or the request was withdrawn, or the mount is gone.
		default:
			s.opts.Log.Error("the kernel refused an answer", "error", err, "bytes", len(b))
		}
		return
	}
}

// slowEnd is what remains to be done with the result of a slow read: zeros behind
// Size, and no other gap.
func slowEnd(r slowRead, p []byte, n int, err error) error {
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if want := min(int64(r.n), max(r.file.Size()-r.off, 0)); int64(n) < want || len(p) < r.n {
		return io.ErrUnexpectedEOF
	}
	clear(p[n:])
	return nil
}
