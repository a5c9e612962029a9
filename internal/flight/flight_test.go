package flight

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errTestClosed = fmt.Errorf("closed: %w", blockdev.ErrUnavailable)

// job is work that ends when it is told to, or when its context ends.
type job struct {
	release chan error
	began   int
	ended   []error // causes
}

func (j *job) begin() (*job, Work) {
	j.began++
	return j, func(ctx context.Context) error {
		select {
		case err := <-j.release:
			return err
		case <-ctx.Done():
			j.ended = append(j.ended, context.Cause(ctx))
			return ctx.Err()
		}
	}
}

func newJob() *job { return &job{release: make(chan error)} }

func join(t *testing.T, g *Group[string, *job], key string, j *job) *Asker[*job] {
	t.Helper()
	a, err := g.Join(key, j.begin)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestOnceForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New[string, *job](Policy{Outlives: true}, errTestClosed)
		defer g.Close()
		j, other := newJob(), newJob()
		first, second := join(t, g, "a", j), join(t, g, "a", other)
		if !first.Led || second.Led || second.State != j || other.began != 0 {
			t.Errorf("led: %t, %t; %d began twice", first.Led, second.Led, other.began)
		}
		if g.Len() != 1 || len(g.States()) != 1 || g.States()[0] != j {
			t.Errorf("%d flights, states %v", g.Len(), g.States())
		}
		// One that leaves takes nothing from the other.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := first.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("who left: %v", err)
		}
		want := errors.New("no luck")
		j.release <- want
		if err := second.Wait(t.Context()); !errors.Is(err, want) || !errors.Is(second.Err(), want) {
			t.Errorf("who stayed: %v", err)
		}
		if g.Len() != 0 {
			t.Error("what has ended can be joined")
		}
		// The next one begins anew.
		if a := join(t, g, "a", other); !a.Led {
			t.Error("joined what has ended")
		}
	})
}

// TestAlone: what becomes of work that nobody asks for, by policy.
func TestAlone(t *testing.T) {
	for _, tt := range []struct {
		name   string
		policy Policy
		asked  time.Duration // for how long somebody asks
		lives  time.Duration // since the begin; 0: until it is done
		comeIn time.Duration // when somebody joins again, for a second; 0: nobody
	}{
		{name: "ends at once", asked: 2 * time.Second, lives: 2 * time.Second},
		{name: "outlives", policy: Policy{Outlives: true}, asked: time.Second},
		{name: "grace", policy: Policy{Grace: time.Minute}, asked: time.Second, lives: 61 * time.Second},
		{name: "joined within the grace", policy: Policy{Grace: time.Minute}, asked: time.Second, comeIn: 50 * time.Second, lives: 111 * time.Second},
		{name: "least", policy: Policy{Least: time.Minute}, asked: time.Second, lives: time.Minute},
		{name: "asked for longer than least", policy: Policy{Least: time.Minute}, asked: time.Hour, lives: time.Hour},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := New[string, *job](tt.policy, errTestClosed)
				j := newJob()
				start := time.Now()
				stay := func(d time.Duration) {
					ctx, cancel := context.WithTimeout(t.Context(), d)
					defer cancel()
					if err := join(t, g, "a", j).Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
						t.Error(err)
					}
				}
				stay(tt.asked)
				if tt.comeIn > 0 {
					time.Sleep(tt.comeIn - time.Since(start))
					stay(time.Second)
				}
				if tt.lives > 0 {
					time.Sleep(tt.lives - time.Since(start) - time.Millisecond)
					synctest.Wait()
					if tt.lives > tt.asked && g.Len() != 1 {
						t.Error("ended before its time")
					}
					time.Sleep(2 * time.Millisecond)
				} else {
					time.Sleep(24 * time.Hour)
				}
				synctest.Wait()
				if ended := len(j.ended) > 0; ended != (tt.lives > 0) || ended && !errors.Is(j.ended[0], ErrAlone) || j.began != 1 {
					t.Errorf("ended %v, began %d times", j.ended, j.began)
				}
				if left := g.Len(); left != map[bool]int{true: 0, false: 1}[tt.lives > 0] {
					t.Errorf("%d flights can be joined", left)
				}
				g.Close()
			})
		})
	}
}

func TestLeaveTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New[string, *job](Policy{}, errTestClosed)
		defer g.Close()
		j := newJob()
		a, b := join(t, g, "a", j), join(t, g, "a", j)
		a.Leave()
		a.Leave()
		synctest.Wait()
		if len(j.ended) != 0 {
			t.Fatal("ended although somebody asks")
		}
		b.Leave()
		synctest.Wait()
		if len(j.ended) != 1 {
			t.Error("goes on although nobody asks")
		}
		<-b.Done()
		if !errors.Is(b.Err(), ErrAlone) || !errors.Is(b.Err(), context.Canceled) {
			t.Error(b.Err())
		}
	})
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New[string, *job](Policy{Outlives: true}, errTestClosed)
		j := newJob()
		a := join(t, g, "a", j)
		g.Close()
		if err := a.Wait(t.Context()); !errors.Is(err, errTestClosed) {
			t.Error(err)
		}
		if _, err := g.Join("a", j.begin); !errors.Is(err, errTestClosed) || j.began != 1 {
			t.Errorf("%v; began %d times", err, j.began)
		}
	})
}

// TestOwnPolicy: the policy of a piece of work is that of who has begun it.
func TestOwnPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New[string, *job](Policy{}, errTestClosed)
		defer g.Close()
		j := newJob()
		a, err := g.JoinWith("a", Policy{Outlives: true}, j.begin)
		if err != nil {
			t.Fatal(err)
		}
		b := join(t, g, "a", j)
		a.Leave()
		b.Leave()
		synctest.Wait()
		if g.Len() != 1 {
			t.Error("has ended with its askers")
		}
	})
}

func TestProgress(t *testing.T) {
	var w Progress[int]
	var a, b []int
	w.Watch(func(p int) { a = append(a, p) })
	w.Report(1)
	end := w.Watch(func(p int) { b = append(b, p) })
	w.Report(2)
	end()
	w.Report(3)
	if fmt.Sprint(a, b) != "[1 2 3] [1 2]" {
		t.Error(a, b)
	}
}
