package fusefs

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
)

// Options of a Server. The zero value of each means its default.
type Options struct {
	// Log takes warnings and errors; default: nothing is logged.
	Log *slog.Logger
	// Loops is the number of goroutines that read requests. Default: twice
	// GOMAXPROCS, at least 4.
	Loops int
	// SlowBytes bounds the memory for answers to reads that had to wait for missing
	// bytes. A read has a part of it only from when its bytes are here until it is
	// answered. Default: 32 MiB; at least MaxRead.
	SlowBytes int64
	// ReadTimeout is how long after the kernel gave it to this server a read is
	// answered with EIO at the latest, queueing included. Default: 1 minute.
	ReadTimeout time.Duration
	// Describe returns what an operator calls a diff, as attributes of log lines:
	// its image and layer. Default: none.
	Describe func(blockdev.Digest) []any
	// Observe is called for each read that was answered with its bytes: the farthest place
	// that some of them have come from, and the time since the kernel gave the read to
	// this server. It is called from many goroutines and does not wait. Default: no
	// call.
	Observe func(from blockdev.Origin, took time.Duration)
	// Failed is called for each read that was answered with EIO, and why. It is called from
	// many goroutines and does not wait. Default: no call.
	Failed func(id blockdev.Digest, why error)
	// Init is what Server.Init returned on a connection that another server has
	// answered before. Empty: the kernel will send FUSE_INIT.
	Init []byte
	// Pending is what NewPending has made for this connection, here or in an earlier
	// process: requests are noted in it while they are worked on, so that the process that
	// serves the connection next knows what is left to be answered. It may be closed
	// when New has returned. Default: no record.
	Pending *os.File

	// noResend is for tests: the kernel does as one before Linux 6.9.
	noResend bool
}

func (o *Options) setDefaults() {
	defaults.Log(&o.Log)
	defaults.Positive(&o.Loops, max(4, 2*runtime.GOMAXPROCS(0)))
	defaults.Positive(&o.SlowBytes, 32<<20)
	o.SlowBytes = max(o.SlowBytes, MaxRead)
	if o.Describe == nil {
		o.Describe = func(blockdev.Digest) []any { return nil }
	}
	if o.Observe == nil {
		o.Observe = func(blockdev.Origin, time.Duration) {}
	}
	if o.Failed == nil {
		o.Failed = func(blockdev.Digest, error) {}
	}
	defaults.Positive(&o.ReadTimeout, time.Minute)
}

// Server answers the requests of one FUSE connection.
type Server struct {
	file  *os.File
	fd    int // of file
	opts  Options
	nodes *nodes
	slow  *slowReads

	buffers  buffers
	failures failureLog
	failed   atomic.Int64 // reads
	tries    secondTries
	pending  *pending
	// repeat is closed when what is left in pending is to be answered.
	repeat chan struct{}

	// protocol is held for writing while INIT sets what ps has negotiated.
	protocol sync.RWMutex
	ps       *fuse.ProtocolServer
	init     []byte // set before agreed is closed
	agreed   chan struct{}

	// lead is held by the goroutine that waits for the next request.
	lead sync.Mutex
	// stop is an eventfd that ends the wait.
	stop   int
	served atomic.Bool
}

// errStopped ends what Serve started.
var errStopped = errors.New("the FUSE server is stopping")

// New prepares to serve files on a descriptor that Mount returned, here or in
// another process. The descriptor becomes non-blocking; it stays the caller's
// and must be closed after Serve has returned.
func New(fd *os.File, files Files, o Options) (*Server, error) {
	o.setDefaults()
	s := &Server{
		file: fd,
		// Fd would make it blocking later, so it is called once, now.
		fd:     int(fd.Fd()),
		opts:   o,
		nodes:  &nodes{files: files, ids: make(map[uint64]blockdev.Digest)},
		agreed: make(chan struct{}),
		repeat: make(chan struct{}),
	}
	s.slow = newSlowReads(s, o.SlowBytes)
	if err := unix.SetNonblock(s.fd, true); err != nil {
		return nil, fmt.Errorf("make the FUSE descriptor non-blocking: %w", err)
	}
	var agreed agreement
	if len(o.Init) > 0 {
		var err error
		if agreed, err = parseAgreement(o.Init); err != nil {
			return nil, err
		}
	}
	raw := &rawFS{RawFileSystem: fuse.NewDefaultRawFileSystem(), nodes: s.nodes, log: o.Log}
	s.ps = fuse.NewProtocolServer(raw, &fuse.MountOptions{
		Name:                "shoal",
		MaxWrite:            MaxRead, // becomes max_pages
		MaxBackground:       maxBackground,
		CongestionThreshold: maxBackground,
		ExtraCapabilities:   fuse.CAP_ASYNC_DIO,
		DisabledCapabilities: fuse.CAP_PASSTHROUGH | fuse.CAP_READDIRPLUS | fuse.CAP_NO_OPEN_SUPPORT |
			fuse.CAP_AUTO_INVAL_DATA | agreed.refused(),
		DisableXAttrs: true,
		Logger:        slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	})
	if len(o.Init) > 0 {
		answer, err := s.negotiate(agreed.request)
		if err != nil {
			return nil, err
		}
		if !agreed.same(answer) {
			// Flags beyond the old ones were refused above; what is left is said so
			// that it can be found should the kernel behave in an unexpected way.
			o.Log.Warn("this version of shoal would negotiate another FUSE protocol; the connection keeps the protocol that it has",
				"agreed", hex.EncodeToString(agreed.answer), "would", hex.EncodeToString(answer))
		}
		s.agree(o.Init)
	}
	var err error
	if s.pending, err = openPending(o.Pending); err != nil {
		return nil, err
	}
	return s, nil
}

// Init returns what the kernel and the connection's first server have agreed on:
// the FUSE_INIT request, and after it the answer, both as they went over the
// descriptor. A later server of the connection needs it as Options.Init. Init
// waits for the kernel to send the request, so Serve must run; it fails if ctx
// ends before.
func (s *Server) Init(ctx context.Context) ([]byte, error) {
	select {
	case <-s.agreed:
		return s.init, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("the kernel has not sent FUSE_INIT: %w", context.Cause(ctx))
	}
}

func (s *Server) agree(init []byte) {
	s.protocol.Lock()
	defer s.protocol.Unlock()
	if s.init == nil {
		s.init = bytes.Clone(init)
		close(s.agreed)
	}
}

// negotiate makes the answer to INIT. What it agrees to belongs to the
// connection.
func (s *Server) negotiate(req []byte) (answer []byte, err error) {
	out := make([]byte, outHeaderSize+maxOutData)
	s.protocol.Lock()
	n, st := s.ps.HandleRequest([][]byte{req}, [][]byte{out})
	s.protocol.Unlock()
	if st != fuse.OK {
		return nil, fmt.Errorf("FUSE_INIT: %w", unix.Errno(st))
	}
	out = out[:n]
	if n > initOutMaxWrite+4 {
		// Nothing is ever written, and read(2) wants a buffer of max_write bytes.
		putUint32(out[initOutMaxWrite:], pageSize)
	}
	return out, nil
}

// Resume makes sure that requests are answered which an earlier server has read and
// not answered: the kernel sends them again (Linux 6.9), or else they are in
// Options.Pending. If it does not and they are not, the error wraps
// blockdev.ErrUnsupported: then they stay without an answer. Resume is called once,
// after the earlier server has ended, while Serve runs or before it.
func (s *Server) Resume() error {
	err := s.resend()
	switch {
	case err == nil:
		for _, l := range s.pending.left {
			s.pending.give(l)
		}
		return nil
	case !errors.Is(err, unix.EINVAL):
		return fmt.Errorf("FUSE_NOTIFY_RESEND: %w", err)
	case s.opts.Pending == nil:
		return fmt.Errorf("this kernel does not repeat requests (Linux 6.9 does): %w", blockdev.ErrUnsupported)
	}
	close(s.repeat)
	return nil
}

// resend fails with EINVAL before Linux 6.9.
func (s *Server) resend() error {
	if s.opts.noResend {
		return unix.EINVAL
	}
	var b [outHeaderSize]byte
	// A notification is an answer to request 0 with its code as the error.
	putOutHeader(b[:], 0, 0, 0)
	putUint32(b[4:], notifyResend)
	_, err := unix.Write(s.fd, b[:])
	return err
}

// repeated answers what an earlier server has left, once Resume says so.
func (s *Server) repeated(ctx context.Context) {
	select {
	case <-s.repeat:
	case <-ctx.Done():
		return
	}
	w := newWorker(s)
	defer w.close()
	s.pending.give(w.slot)
	for _, w.slot = range s.pending.left {
		if ctx.Err() != nil {
			return // the next one finds them
		}
		if n := *w.slot.length(); n <= slotSize {
			w.handle(ctx, w.slot[:n])
		} else {
			h, _ := parseHeader(w.slot)
			s.fail(h.unique, unix.EIO)
		}
		s.pending.give(w.slot) // it, or a free one if the request is still worked on
	}
}

// Serve answers requests until ctx ends or the mount is gone (nil in both
// cases), or the descriptor fails. It returns when nothing of it runs any more.
// It can be called once.
func (s *Server) Serve(ctx context.Context) error {
	if s.served.Swap(true) {
		return errors.New("a FUSE server can serve once")
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	s.stop = stop
	defer func() { _ = unix.Close(stop) }()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	woken := make(chan struct{})
	unhook := context.AfterFunc(ctx, func() {
		defer close(woken)
		s.wake()
	})

	var loops sync.WaitGroup
	var first error
	var once sync.Once
	for range s.opts.Loops {
		loops.Go(func() {
			err := s.loop(ctx)
			if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, errStopped) {
				once.Do(func() { first = fmt.Errorf("read from the FUSE descriptor: %w", err) })
			}
			// One loop's end is everybody's.
			cancel(errStopped)
		})
	}
	loops.Go(func() { s.repeated(ctx) })
	loops.Wait()
	s.slow.stop()
	if !unhook() {
		<-woken // it uses the eventfd
	}
	runtime.KeepAlive(s.file)
	return errors.Join(first, s.pending.close())
}

func (s *Server) wake() {
	one := [8]byte{1, 1, 1, 1, 1, 1, 1, 1} // any number but 0, in any byte order
	_, _ = unix.Write(s.stop, one[:])
}

// loop reads requests and answers them, or hands them to slow.
func (s *Server) loop(ctx context.Context) error {
	w := newWorker(s)
	defer w.close()
	for {
		n, err := s.next(ctx, w)
		if err != nil {
			return err
		}
		w.handle(ctx, w.request(n))
		w.slot.clear()
	}
}

// next reads one request. One goroutine at a time waits here, the others for the
// lock: they cost no thread.
func (s *Server) next(ctx context.Context, w *worker) (int, error) {
	s.lead.Lock()
	defer s.lead.Unlock()
	for {
		if ctx.Err() != nil {
			return 0, errStopped
		}
		n, errno := w.receive()
		switch errno {
		case 0:
			if n > 0 {
				return n, nil
			}
			return 0, unix.ENODEV
		case unix.EAGAIN:
			fds := [2]unix.PollFd{
				{Fd: int32(s.fd), Events: unix.POLLIN},
				{Fd: int32(s.stop), Events: unix.POLLIN},
			}
			if _, err := unix.Poll(fds[:], -1); err != nil && err != unix.EINTR {
				return 0, err
			}
		case unix.EINTR, unix.ENOENT:
			// ENOENT: the request was withdrawn while it was being read.
		default:
			return 0, errno
		}
	}
}
