package images

import (
	"context"
	"errors"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"github.com/shoalfs/shoal/blockdev"
)

// All pulls together hold no more encoded indexes than this, from before the first
// byte of them is read until they have been added. Small images have room of their
// own, so that they do not stand behind large ones, which may be hostile. An image that
// takes more than there is room for large ones has that for itself.
const (
	smallIndexes = 1 << 20 // of an image
	roomForSmall = 16 << 20
	roomForLarge = 128 << 20
)

// errNoRoom ends a request for indexes that there is no room for now.
var errNoRoom = errors.New("the indexes of other images take all the memory for indexes")

// indexRoom is the memory for encoded indexes, in bytes.
type indexRoom struct {
	small, large       *semaphore.Weighted
	most               int64 // of an image that is small
	forSmall, forLarge int64 // what small and large have
	held, waiting      atomic.Int64
}

func newIndexRoom(most, forSmall, forLarge int64) *indexRoom {
	return &indexRoom{
		small: semaphore.NewWeighted(forSmall), large: semaphore.NewWeighted(forLarge),
		most: most, forSmall: forSmall, forLarge: forLarge,
	}
}

// of returns where an image with n bytes of indexes has its room, and how much of it.
func (r *indexRoom) of(n int64) (*semaphore.Weighted, int64) {
	if n <= r.most {
		return r.small, min(n, r.forSmall)
	}
	return r.large, min(n, r.forLarge)
}

// place is what one opening holds of the room. An opening that has to wait for more gives back
// what it has before: so each place is given back by a caller that waits for none.
type place struct {
	room *indexRoom
	held int64
	want int64 // what there was no room for
}

// admit is image.Request.Admit.
func (p *place) admit(n int64) error {
	if n <= p.held {
		return nil
	}
	p.leave()
	if sem, weight := p.room.of(n); !sem.TryAcquire(weight) {
		p.want = n
		return errNoRoom
	}
	p.hold(n)
	return nil
}

// hold notes that there is room for n.
func (p *place) hold(n int64) {
	p.held = n
	_, weight := p.room.of(n)
	p.room.held.Add(weight)
}

// use returns the bytes of room that are taken, and how many openings wait for some.
func (r *indexRoom) use() blockdev.Use {
	return blockdev.Use{Used: r.held.Load(), Waiting: r.waiting.Load(), Capacity: r.forSmall + r.forLarge}
}

// wait returns when there is room for what admit has refused.
func (p *place) wait(ctx context.Context) error {
	sem, weight := p.room.of(p.want)
	p.room.waiting.Add(1)
	defer p.room.waiting.Add(-1)
	if err := sem.Acquire(ctx, weight); err != nil {
		return errors.Join(errNoRoom, err)
	}
	p.hold(p.want)
	return nil
}

func (p *place) leave() {
	if p.held > 0 {
		sem, weight := p.room.of(p.held)
		sem.Release(weight)
		p.room.held.Add(-weight)
		p.held = 0
	}
}
