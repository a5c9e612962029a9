package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/integration/report"
	"github.com/shoalfs/shoal/p2p/roster/cells"
	"github.com/shoalfs/shoal/p2p/wire"
)

// The lists of who is in a group are the supernode's own (p2p/roster/cells), so here its
// processor's time is measured, on the machine that this runs on.

// sink takes what a member is sent.
type sink struct{}

func (sink) Send([]byte) bool { return true }

func toSink(int) cells.Receiver { return sink{} }

// list is a group that nodes join.
type list struct {
	*cells.Group[int]
	bytes int // sent
}

func newList() *list { return &list{Group: cells.New[int](blockdev.Digest{1})} }

// newMember is node i, in one of so many zones; 40 of them share a rack.
func newMember(i, zones int) *cells.Member {
	key := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(i)))
	return cells.NewMember(fmt.Sprint("zone-", i%zones), &wire.GroupMember{Key: key[:], Rack: fmt.Sprint(i / 40),
		Addrs: [][]byte{{10, 1, byte(i >> 8), byte(i), 30, 23}}})
}

// flush tells the members what is new; locked is the part of it in which the
// supernode holds the lock that streams need.
func (l *list) flush() (took, locked time.Duration, err error) {
	begin := time.Now()
	u := l.Collect(toSink)
	locked = time.Since(begin)
	_, err = u.Send()
	l.bytes += u.Bytes
	return time.Since(begin), locked, err
}

// join has all of these join within so many flushes.
func (l *list) join(all []*cells.Member, flushes int) (took time.Duration, err error) {
	begin := time.Now()
	for i, m := range all {
		l.Add(i, m, nil)
		if (i+1)%max(len(all)/flushes, 1) == 0 {
			if _, _, err := l.flush(); err != nil {
				return 0, err
			}
		}
	}
	return time.Since(begin), nil
}

// lists measures what a zone for each node costs.
func lists(ctx context.Context, o *options, rep *report.Report) error {
	crowd, nodes := max(int(1000*o.scale), 2), max(int(10_000*o.scale), 20)
	var alone, many, one []*cells.Member
	for i := range crowd {
		alone = append(alone, newMember(i, crowd))
	}
	for i := range nodes {
		many, one = append(many, newMember(i, crowd)), append(one, newMember(i, 1))
	}
	var flush, locked, ratio, joins, bytes []float64
	for range 2*o.runs + 1 {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		l := newList()
		for i, m := range alone {
			l.Add(i, m, nil)
		}
		took, inLock, err := l.flush()
		if err != nil {
			return fmt.Errorf("lists: %w", err)
		}
		flush, locked = append(flush, ms(took)), append(locked, ms(inLock))
		inOne, inMany := newList(), newList()
		first, err := inOne.join(one, 10)
		if err != nil {
			return fmt.Errorf("lists: %w", err)
		}
		second, err := inMany.join(many, 10)
		if err != nil {
			return fmt.Errorf("lists: %w", err)
		}
		joins = append(joins, ms(first))
		ratio = append(ratio, float64(second)/float64(first))
		bytes = append(bytes, float64(inMany.bytes)/float64(inOne.bytes))
	}
	rep.Add("flush of a group of 1,000 nodes in a zone each", "ms", report.AtMost, 20, flush...)
	rep.Note("flush of a group of 1,000 nodes in a zone each: of that with the lock held", "ms", locked...)
	rep.Note("join of 10,000 nodes in one zone within 10 flushes", "ms", joins...)
	rep.Add("join of 10,000 nodes in 1,000 zones against in one zone: time", "x", report.AtMost, 4, ratio...)
	rep.Add("join of 10,000 nodes in 1,000 zones against in one zone: bytes sent", "x", report.AtMost, 4, bytes...)
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }
