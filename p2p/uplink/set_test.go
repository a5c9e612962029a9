package uplink

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// closable is a supernode that answers nothing, and whose requests end when it is closed,
// as a client's do.
type closable struct {
	*fake
	gone chan struct{}
}

func newClosable(f *fake) *closable {
	c := &closable{f, make(chan struct{})}
	f.hangs = func() <-chan struct{} { return c.gone }
	return c
}

func (c *closable) Close() error {
	close(c.gone)
	return nil
}

func (c *closable) Status() error {
	select {
	case <-c.gone:
		return errGone
	default:
		return nil
	}
}

func (c *closable) Fetch(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
	if err := c.begin(ctx, nil); err != nil {
		return err
	}
	return errGone
}

// TestSet: requests that begin after a change ask the new supernodes alone; of those under
// way the ones at a supernode that is left out go on at the next one, and those at one that
// stays are left alone.
func TestSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		list := chunks(4)
		_, s := newUplink(t, 3)
		haveAll(s, list)
		first, second, third := newClosable(s[0]), s[1], s[2]
		u, err := New(map[peer.ID]Supernode{"a": first, "b": second})
		if err != nil {
			t.Fatal(err)
		}
		for u.order(key, 0)[0] != first { // the one that is left out is to be the owner
			key[0]++
		}
		began := time.Now()
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() { read(t, u, blockdev.Demand, list) })
		}
		time.Sleep(100 * time.Millisecond)
		if err := u.Set(nil); err == nil {
			t.Error("no supernode is taken for some")
		}
		if err := u.Set(map[peer.ID]Supernode{"b": second, "c": third}); err != nil {
			t.Fatal(err)
		}
		all.Wait()
		if took := time.Since(began); took != 100*time.Millisecond || second.count() != 8 {
			t.Errorf("took %v, and the next one was asked %d times", took, second.count())
		}
		asked := first.count()
		for range 16 {
			key[0]++
			read(t, u, blockdev.Demand, list)
		}
		if first.count() != asked || second.count() == 8 || third.count() == 0 {
			t.Errorf("asked %d, %d and %d times", first.count()-asked, second.count()-8, third.count())
		}
	})
}

// TestSetOne: a node with one supernode gets a second one, and then has that alone.
func TestSetOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		list := chunks(4)
		_, s := newUplink(t, 2)
		haveAll(s, list)
		s[0].hangs = after(time.Minute)
		u, err := New(map[peer.ID]Supernode{"a": s[0]})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := u.FetchIndexes(t.Context(), image.Request{Manifest: key}); err != nil {
			t.Fatal(err)
		}
		done := make(chan time.Duration)
		go func() { done <- read(t, u, blockdev.Demand, list) }()
		synctest.Wait()
		if err := u.Set(map[peer.ID]Supernode{"a": s[0], "b": s[1]}); err != nil {
			t.Fatal(err)
		}
		if took := <-done; took != time.Minute || s[1].count() != 0 {
			t.Errorf("what was under way took %v, and the other was asked %d times", took, s[1].count())
		}
		report := func() {
			t.Helper()
			if err := u.ReportProfiles(t.Context(), []blockdev.DiffProfile{{Diff: layerDiff}}); err != nil {
				t.Error(err)
			}
		}
		report()
		if err := u.Set(map[peer.ID]Supernode{"b": s[1]}); err != nil {
			t.Fatal(err)
		}
		report()
		if len(s[0].told) != 1 || len(s[1].told) != 1 {
			t.Errorf("what is read was told %d times to the one that gave out the index, then %d times to the one that is left", len(s[0].told), len(s[1].told))
		}
		s[1].away, s[1].gone = errGone, time.Minute
		if u.Status() == nil || !u.Away(time.Second) {
			t.Error("the one that was left out counts")
		}
	})
}
