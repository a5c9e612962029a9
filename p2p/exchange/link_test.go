package exchange

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// slowLink passes connections to target on, from target at rate bytes a second
// and delayed; what goes to target is only delayed. Its queue is 1 MB, as that of
// a switch: whatever a sender has under way stands in it.
func slowLink(t testing.TB, target net.Addr, rate int64, delay time.Duration) ma.Multiaddr {
	t.Helper()
	ln, err := net.Listen("tcp", loopback)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial(target.Network(), target.String())
			if err != nil {
				_ = near.Close()
				return
			}
			go carry(near, far, rate, delay)
			go carry(far, near, 0, delay)
		}
	}()
	a, err := manet.FromNetAddr(ln.Addr())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

type segment struct {
	b  []byte
	at time.Time // when it arrives
}

func carry(dst, src net.Conn, rate int64, delay time.Duration) {
	queue := make(chan segment, 128)
	go func() {
		for s := range queue {
			sleepUntil(s.at)
			_, _ = dst.Write(s.b)
		}
		_ = dst.Close()
	}()
	free := time.Now()
	for {
		b := make([]byte, 16<<10)
		n, err := src.Read(b)
		if n > 0 {
			if now := time.Now(); free.Before(now) {
				free = now
			}
			if rate > 0 {
				free = free.Add(time.Duration(int64(n) * int64(time.Second) / rate))
			}
			queue <- segment{b[:n], free.Add(delay)}
		}
		if err != nil {
			break
		}
	}
	close(queue)
	_, _ = io.Copy(io.Discard, src)
}

// sleepUntil is more exact than time.Sleep, which may be late by a millisecond:
// more than the delay of a link within a datacenter.
func sleepUntil(at time.Time) {
	if d := time.Until(at) - 2*time.Millisecond; d > 0 {
		time.Sleep(d)
	}
	for d := time.Until(at) - 50*time.Microsecond; d > 0; d = time.Until(at) - 50*time.Microsecond {
		ts := unix.NsecToTimespec(int64(d))
		_ = unix.Nanosleep(&ts, nil)
	}
}

// linked is a client of a server with 32 MiB of 64 KiB chunks, behind a link.
func linked(b *testing.B, rate int64, delay time.Duration) (*Client, []blockdev.Chunk) {
	b.Helper()
	data := make([][]byte, 512)
	for i := range data {
		data[i] = text(uint64(i), blockdev.AvgChunk)
	}
	st, chunks := newStore(b, false, data...)
	h := newHost(b, nil, loopback)
	newServer(b, h, ServerConfig{Chunks: st})
	info := peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}
	if rate > 0 {
		target, err := manet.ToNetAddr(h.Addrs()[0])
		if err != nil {
			b.Fatal(err)
		}
		info.Addrs = []ma.Multiaddr{slowLink(b, target, rate, delay)}
	}
	c, err := NewClient(newHost(b, nil), info, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	return c, chunks
}

// prefetchOn prefetches in requests of 1 MiB, several at a time, until stopped.
func prefetchOn(b *testing.B, c *Client, chunks []blockdev.Chunk, several int) (moved *atomic.Int64, stop func()) {
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	moved = new(atomic.Int64)
	for k := range several {
		wg.Go(func() {
			for i := k; ctx.Err() == nil; i += several {
				part := chunks[i*16%len(chunks):][:16]
				_ = c.Fetch(ctx, request(blockdev.Prefetch, part), func(_ int, data []byte) error {
					moved.Add(int64(len(data)))
					return nil
				})
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	return moved, func() {
		cancel()
		wg.Wait()
	}
}

// BenchmarkLink is a demand read of 64 KiB now and then over a link: alone, and
// beside as much prefetch as there is room for. prefetch-only is what that comes
// to without demand reads.
func BenchmarkLink(b *testing.B) {
	const gigabit = 1e9 / 8
	for _, link := range []struct {
		name  string
		rate  int64
		delay time.Duration
	}{
		{"1Gbit-200us", gigabit, 100 * time.Microsecond},
		{"100Mbit-200us", gigabit / 10, 100 * time.Microsecond},
		{"1Gbit-10ms", gigabit, 5 * time.Millisecond},
		{"loopback", 0, 0},
	} {
		for _, mode := range []struct {
			several int
			every   time.Duration
		}{{0, 5 * time.Millisecond}, {4, 5 * time.Millisecond}, {4, 400 * time.Millisecond}} {
			b.Run(fmt.Sprintf("%s/prefetch=%d/every=%v", link.name, mode.several, mode.every), func(b *testing.B) {
				c, chunks := linked(b, link.rate, link.delay)
				moved, stop := prefetchOn(b, c, chunks, mode.several)
				defer stop()
				var took []time.Duration
				before, begin := moved.Load(), time.Now()
				for i := 0; b.Loop(); i++ {
					i %= len(chunks)
					start := time.Now()
					if err := c.Fetch(b.Context(), request(blockdev.Demand, chunks[i:i+1]), discard); err != nil {
						b.Fatal(err)
					}
					took = append(took, time.Since(start))
					time.Sleep(mode.every)
				}
				report(b, took)
				b.ReportMetric(float64(moved.Load()-before)/1e6/time.Since(begin).Seconds(), "prefetch-MB/s")
			})
		}
		b.Run(link.name+"/prefetch-only", func(b *testing.B) {
			c, chunks := linked(b, link.rate, link.delay)
			moved, stop := prefetchOn(b, c, chunks, 4)
			defer stop()
			before, begin := moved.Load(), time.Now()
			for b.Loop() {
				time.Sleep(100 * time.Millisecond)
			}
			b.ReportMetric(float64(moved.Load()-before)/1e6/time.Since(begin).Seconds(), "prefetch-MB/s")
		})
	}
}
