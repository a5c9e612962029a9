package images

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoalfs/shoal/internal/image"
)

// slowIndexes is a supernode whose images have indexes of these sizes, in bytes: it
// says them one after the other and takes a second to send what has been admitted.
type slowIndexes struct {
	sizes map[string][]int64 // by reference
	hangs string             // reference of an image that does not come

	mu     sync.Mutex
	sent   map[string]int64 // now, by reference
	asked  map[string]int
	most   int64 // of what has been sent at a time
	beside int64 // the most that came beside "huge"
}

func (s *slowIndexes) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	s.count(func() { s.asked[req.Ref]++ })
	for _, n := range s.sizes[req.Ref] {
		if err := req.Admit(n); err != nil {
			return nil, fmt.Errorf("image %s: %w", req.Ref, err)
		}
		s.count(func() { s.sent[req.Ref] = n })
		wait := time.Second
		if req.Ref == s.hangs {
			wait = 24 * time.Hour
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			s.gone(req.Ref)
			return nil, ctx.Err()
		}
		s.gone(req.Ref)
	}
	s.count(func() { s.sent[req.Ref] = s.sizes[req.Ref][len(s.sizes[req.Ref])-1] })
	return &image.Image{Ref: req.Ref}, nil
}

func (s *slowIndexes) gone(ref string) { s.count(func() { delete(s.sent, ref) }) }

func (s *slowIndexes) count(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	var total int64
	for _, n := range s.sent {
		total += n
	}
	s.most = max(s.most, total)
	if n := s.sent["huge"]; n > 0 {
		s.beside = max(s.beside, total-n)
	}
}

// pullIndexes is the part of open that needs room, with a second for the rest.
func pullIndexes(op *opener, ref string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	at := place{room: op.room}
	defer at.leave()
	_, err := op.indexes(ctx, image.Request{Ref: ref}, &at)
	if err == nil {
		time.Sleep(time.Second) // it is added
		op.cfg.Images.(*slowIndexes).gone(ref)
	}
	return err
}

func newSlowIndexes(sizes map[string][]int64) (*slowIndexes, *opener) {
	src := &slowIndexes{sizes: sizes, sent: map[string]int64{}, asked: map[string]int{}}
	return src, &opener{cfg: &Config{Images: src}, room: newIndexRoom(10, 40, 100)}
}

// All pulls together have no more encoded indexes in memory than there is room for;
// an image that takes more has the room for itself; and a supernode is not kept busy
// by those that wait. Sizes that become known bit by bit block nobody for ever.
func TestIndexRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sizes := map[string][]int64{"huge": {250}}
		for i := range 20 {
			sizes[fmt.Sprint("large", i)] = []int64{30}
			sizes[fmt.Sprint("grows", i)] = []int64{5, 20, 60, 90}
		}
		src, op := newSlowIndexes(sizes)
		var wg sync.WaitGroup
		for ref := range sizes {
			wg.Go(func() {
				if err := pullIndexes(op, ref); err != nil {
					t.Errorf("%s: %v", ref, err)
				}
			})
		}
		wg.Wait()
		if src.most < 250 || src.beside > 40 { // what is small has room of its own
			t.Errorf("%d bytes at a time, of which %d beside the huge image", src.most, src.beside)
		}
		for ref, n := range src.asked {
			if n > 1+len(sizes[ref]) {
				t.Errorf("%s: the supernode was asked %d times", ref, n)
			}
		}
		delete(sizes, "huge")
		src, op = newSlowIndexes(sizes)
		for ref := range sizes {
			wg.Go(func() {
				if err := pullIndexes(op, ref); err != nil {
					t.Errorf("%s: %v", ref, err)
				}
			})
		}
		wg.Wait()
		if src.most > 140 {
			t.Errorf("%d bytes at a time, want 140 at the most", src.most)
		}
		if u := op.room.use(); u.Used != 0 || u.Waiting != 0 || u.Capacity != 140 {
			t.Errorf("left in use: %+v", u)
		}
	})
}

// Whoever hangs stops no small image, and a large one until its own time is over at the
// most. Whoever waits can leave.
func TestIndexRoomHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, op := newSlowIndexes(map[string][]int64{"hangs": {100}, "small": {10}, "large": {60}})
		src.hangs = "hangs"
		began := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := pullIndexes(op, "hangs"); !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
		synctest.Wait()
		if err := pullIndexes(op, "small"); err != nil || time.Since(began) > 2*time.Second {
			t.Errorf("small: %v after %v", err, time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		left := place{room: op.room}
		if _, err := op.indexes(ctx, image.Request{Ref: "large"}, &left); !errors.Is(err, context.DeadlineExceeded) || left.held != 0 {
			t.Errorf("left: %v, holds %d", err, left.held)
		}
		if err := pullIndexes(op, "large"); err != nil {
			t.Errorf("large: %v", err)
		}
		if d := time.Since(began); d > 5*time.Minute+3*time.Second {
			t.Errorf("after %v", d)
		}
		wg.Wait()
	})
}
