package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/defaults"
)

// Config of a Cache. Root, Source and Log are required; what else is zero gets
// its default.
type Config struct {
	// Root is the cache's directory; it is made if it is not there.
	Root string
	// Source is where missing chunks come from.
	Source blockdev.Source
	// Log gets what an operator should know: damage, full disks, slow sources.
	Log *slog.Logger

	// Quota bounds what all diffs take of the disk, in bytes, as the file system
	// counts them; 0: the disk alone does.
	Quota int64
	// MakeRoom, if not nil, is called when the quota or the disk is full, in one
	// goroutine at a time. It removes unused diffs, by Remove, and
	// reports whether there were any. It must not wait for an Add or a Prefetch.
	MakeRoom func(ctx context.Context) (freed bool)
	// Damaged, if not nil, is called with a diff each time that a chunk of it turned out to
	// be wrong or unreadable on disk, by whichever reader. The chunk counts as missing by
	// then. It must not wait for anything.
	Damaged func(id blockdev.Digest)

	// Timeout bounds a demand read, retries included. A request to Source may go
	// for three quarters of it without delivering anything, so that a caller that gives up
	// can say why. Default 30 s.
	Timeout time.Duration
	// ReadAhead is how many bytes of missing chunks behind a demand read are
	// asked for in the same request. Default 256 KiB; negative: none.
	ReadAhead int64
	// MaxReadAhead is how far ReadAhead grows, doubling, for a program that reads
	// on where its last request ended. Default 4 MiB.
	MaxReadAhead int64
	// RequestBytes is about how much one request to Source asks for (a chunk more
	// or less, and read-ahead comes on top), prefetch apart: its requests are a part
	// of Inflight. Default 1 MiB.
	RequestBytes int64
	// Inflight, if not nil, says how many bytes prefetch may have asked for and not got
	// yet, in the whole Cache. Default: 4 MiB.
	Inflight func() int64
	// PrefetchRate bounds what prefetch gets from Source, in bytes a second over the
	// whole Cache, but for diffs that a caller waits for (Hurry). 0: no bound.
	PrefetchRate int64
	// DemandBytes bounds what demand requests have in flight in the whole Cache, shared
	// among diffs as package turns does it: requests for one diff have at most half of
	// it, whose source may not answer, and further ones wait for each other. Default
	// 64 MiB.
	DemandBytes int64
	// IndexBytes bounds the memory for indexes that are being decoded, in all pulls and
	// at start together; further ones wait. One that needs more by itself is decoded when
	// no other is. Default 128 MiB.
	IndexBytes int64
	// MaxTree is how many bytes the metadata and implied directories of an index that is
	// added may have, and MaxIndex how much memory it may need to be decoded. Larger ones
	// are blockdev.ErrUnsupported: containerd unpacks the image. Default
	// 64 MiB (about a million files in a layer), and 256 MiB (a layer of some 200 GiB).
	MaxTree, MaxIndex int64
	// Quiet is how long there must have been no demand read before prefetch goes
	// on. Default 500 ms.
	Quiet time.Duration
	// GiveWay is how long one prefetch request at most waits for that before it is
	// sent, too, so that prefetch always gets done. Default 1 s.
	GiveWay time.Duration
	// PrefetchIdle is for how long Source may deliver nothing of a prefetch request:
	// where many nodes share full links, a chunk may be on its way for long, and no read
	// waits for it. Default 1 min.
	PrefetchIdle time.Duration
	// Promote is how long a demand read waits for a chunk that a prefetch request
	// is fetching, before that is asked for again with demand priority.
	// Default 50 ms.
	Promote time.Duration
	// SyncBytes is how much of one diff may be written before it is synced and
	// its pages are dropped from the page cache. Prefetch stops to wait for the
	// disk at four times as much. Default 32 MiB.
	SyncBytes int64
	// SyncInterval is how long a written chunk stays unsynced at most, but for
	// a busy disk. Default 5 s.
	SyncInterval time.Duration
	// Distrusted is called when an index was put under quarantine, with the error of
	// Diff.Distrust. It does not wait. Default: no call.
	Distrusted func(id blockdev.Digest, why error)

	// bootID names this boot of the kernel; tests give their own.
	bootID string
	// decode reads an encoded index; tests give their own.
	decode func([]byte) (*blockdev.Index, error)
}

func (c *Config) setDefaults() error {
	if c.Root == "" || c.Source == nil || c.Log == nil {
		return errors.New("cache: Root, Source and Log must be set")
	}
	defaults.Set(&c.Timeout, 30*time.Second)
	defaults.Set(&c.ReadAhead, 256<<10)
	defaults.Set(&c.RequestBytes, 1<<20)
	defaults.Set(&c.PrefetchIdle, time.Minute)
	if c.Inflight == nil {
		c.Inflight = func() int64 { return 4 << 20 }
	}
	defaults.Set(&c.DemandBytes, 64<<20)
	defaults.Set(&c.IndexBytes, 128<<20)
	defaults.Set(&c.MaxTree, 64<<20)
	defaults.Set(&c.MaxIndex, 256<<20)
	defaults.Set(&c.Quiet, 500*time.Millisecond)
	defaults.Set(&c.GiveWay, time.Second)
	defaults.Set(&c.Promote, 50*time.Millisecond)
	defaults.Set(&c.SyncBytes, 32<<20)
	defaults.Set(&c.SyncInterval, 5*time.Second)
	if c.Distrusted == nil {
		c.Distrusted = func(blockdev.Digest, error) {}
	}
	if c.decode == nil {
		c.decode = index.Decode
	}
	defaults.Set(&c.MaxReadAhead, 4<<20)
	c.ReadAhead = max(c.ReadAhead, 0)
	c.MaxReadAhead = max(c.MaxReadAhead, c.ReadAhead)
	if c.Quota < 0 || c.PrefetchRate < 0 || c.Timeout < 0 || c.RequestBytes < 0 || c.PrefetchIdle < 0 || c.IndexBytes < 0 || c.MaxTree < 0 || c.MaxIndex < 0 || c.Quiet < 0 || c.GiveWay < 0 ||
		c.Promote < 0 || c.MaxReadAhead < 0 || c.SyncBytes < 0 || c.SyncInterval < 0 {
		return errors.New("cache: only ReadAhead may be negative")
	}
	if least := c.RequestBytes + c.MaxReadAhead + 2*blockdev.MaxChunk; c.DemandBytes < least {
		return fmt.Errorf("cache: DemandBytes is %d, but one demand request may take %d (RequestBytes, MaxReadAhead and two chunks)", c.DemandBytes, least)
	}
	return nil
}
