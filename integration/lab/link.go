package lab

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Rate is a link's speed in bytes a second; 0 is no limit.
type Rate int64

// Gigabit is 1 Gbit/s.
const Gigabit Rate = 1e9 / 8

// linkQueue bounds the bytes under way in one direction of one connection. It
// is more than rate times delay of every link that the lab makes, so that the
// delay does not turn into a limit on the rate.
const (
	linkSegment = 32 << 10
	linkQueue   = 256 // segments
)

// Link is a network path to one TCP address, with a rate (shared by all
// connections, each direction on its own) and a delay each way. It does in user
// space what tbf and netem would: netem is not there on every kernel.
type Link struct {
	// Addr is where clients connect.
	Addr string

	target   string
	delay    time.Duration
	down, up shaper
	ln       net.Listener
	wg       sync.WaitGroup
	buffers  sync.Pool // of *[linkSegment]byte

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

// shaper paces one direction.
type shaper struct {
	rate  Rate
	bytes atomic.Int64

	mu   sync.Mutex
	free time.Time // when the last byte that was accepted has left
}

// departure books n bytes and returns when the last of them has left.
func (s *shaper) departure(n int) time.Time {
	s.bytes.Add(int64(n))
	now := time.Now()
	if s.rate == 0 {
		return now
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.free.Before(now) {
		s.free = now
	}
	s.free = s.free.Add(time.Duration(int64(n) * int64(time.Second) / int64(s.rate)))
	return s.free
}

// NewLink listens on a free loopback address and passes connections on to target.
func (l *Lab) NewLink(target string, rate Rate, delay time.Duration) (*Link, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	k := &Link{Addr: ln.Addr().String(), target: target, delay: delay, ln: ln, conns: map[net.Conn]struct{}{}}
	k.down.rate, k.up.rate = rate, rate
	k.buffers.New = func() any { return new([linkSegment]byte) }
	k.wg.Add(1)
	go k.accept()
	l.OnClose(k.Close)
	return k, nil
}

// Down returns the bytes that went from the target to clients since the start.
func (k *Link) Down() int64 { return k.down.bytes.Load() }

// Close cuts all connections and stops listening.
func (k *Link) Close() error {
	k.mu.Lock()
	k.closed = true
	err := k.ln.Close()
	for c := range k.conns {
		_ = c.Close() // ends the copies below; nothing can be done about an error
	}
	k.mu.Unlock()
	k.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (k *Link) accept() {
	defer k.wg.Done()
	for {
		c, err := k.ln.Accept()
		if err != nil {
			return
		}
		k.wg.Add(1)
		go k.serve(c)
	}
}

// track makes Close reach a connection; false: the link is closed already.
func (k *Link) track(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.closed {
		k.conns[c] = struct{}{}
	}
	return !k.closed
}

func (k *Link) untrack(c net.Conn) {
	k.mu.Lock()
	delete(k.conns, c)
	k.mu.Unlock()
	_ = c.Close() // both directions have ended
}

func (k *Link) serve(client net.Conn) {
	defer k.wg.Done()
	if !k.track(client) {
		_ = client.Close()
		return
	}
	defer k.untrack(client)
	time.Sleep(2 * k.delay) // SYN there, SYN+ACK back
	server, err := net.Dial("tcp", k.target)
	if err != nil {
		return
	}
	if !k.track(server) {
		_ = server.Close()
		return
	}
	defer k.untrack(server)
	var both sync.WaitGroup
	both.Add(2)
	go func() { defer both.Done(); k.copy(server, client, &k.up) }()
	go func() { defer both.Done(); k.copy(client, server, &k.down) }()
	both.Wait()
}

type segment struct {
	buf *[linkSegment]byte
	n   int
	at  time.Time // when it reaches the other end
}

// copy moves bytes from src to dst, each segment arriving when the link's rate
// and delay let it.
func (k *Link) copy(dst, src net.Conn, s *shaper) {
	queue := make(chan segment, linkQueue)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for seg := range queue {
			sleepUntil(seg.at)
			if _, err := dst.Write(seg.buf[:seg.n]); err != nil {
				_ = src.Close() // the reader below ends; its last segments drain here
			}
			k.buffers.Put(seg.buf)
		}
		if c, ok := dst.(*net.TCPConn); ok {
			_ = c.CloseWrite() // the other end may have gone already
		}
	}()
	for {
		buf := k.buffers.Get().(*[linkSegment]byte)
		n, err := src.Read(buf[:])
		if n > 0 {
			left := s.departure(n)
			queue <- segment{buf, n, left.Add(k.delay)}
			// A sender cannot be ahead of its link by more than a few segments.
			if ahead := time.Until(left) - 2*time.Millisecond; ahead > 0 {
				time.Sleep(ahead)
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				_ = dst.Close()
			}
			break
		}
	}
	close(queue)
	<-done
}

// slack is how much later than asked the kernel wakes a thread, by default.
const slack = 50 * time.Microsecond

// sleepUntil is exact to some tens of microseconds. time.Sleep may take a
// millisecond longer than it should, which is more than the delay of a link
// within a datacenter.
func sleepUntil(at time.Time) {
	for {
		d := time.Until(at) - slack
		if d <= 0 {
			return
		}
		if d > 2*time.Millisecond {
			time.Sleep(d - 2*time.Millisecond)
			continue
		}
		ts := unix.NsecToTimespec(int64(d))
		_ = unix.Nanosleep(&ts, nil) // a signal ends it early: once more
	}
}
