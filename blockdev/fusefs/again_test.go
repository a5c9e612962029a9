package fusefs

import (
	"context"
	"errors"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev/mount"
)

func TestSecondTry(t *testing.T) {
	const timeout = time.Minute
	t0 := time.Unix(1_000_000, 0)
	at := func(d time.Duration) time.Time { return t0.Add(d) }
	read := func(off int64, n int, deadline time.Time, second bool) slowRead {
		return slowRead{readIn: readIn{off: off}, id: idA, n: n, deadline: deadline, second: second}
	}
	// A large read, of 3 blocks, has timed out after a minute; another has failed early.
	failed := []slowRead{
		read(againBlock-4096, 2*againBlock, at(timeout), false),
		read(10*againBlock, 4096, at(timeout+50*time.Second), false),
		read(20*againBlock, 4096, at(timeout), true),
	}
	for name, c := range map[string]struct {
		off    int64
		now    time.Duration
		want   time.Duration // after t0; 0: the usual time
		second bool
	}{
		"first page":              {againBlock - 4096, timeout, timeout + againWithin, true},
		"last page":               {3*againBlock - 8192, timeout + 900*time.Millisecond, timeout + againWithin, true},
		"other bytes":             {5 * againBlock, timeout, 0, false},
		"later":                   {againBlock, timeout + againWithin, 0, false},
		"much later":              {againBlock, 10 * timeout, 0, false},
		"failed early":            {10 * againBlock, timeout + time.Millisecond, timeout + 50*time.Second, true},
		"after a second try":      {20 * againBlock, timeout, 0, false},
		"the same in other diffs": {0, timeout, 0, false},
	} {
		id := idA
		if name == "the same in other diffs" {
			id = idB
		}
		var tries secondTries
		for _, r := range failed {
			tries.note(r, at(timeout))
		}
		usual := at(c.now + timeout)
		got, second := tries.deadline(id, c.off, at(c.now), usual)
		want := usual
		if c.want > 0 {
			want = at(c.want)
		}
		if !got.Equal(want) || second != c.second {
			t.Errorf("%s: until %v (%v), want %v (%v)", name, got.Sub(t0), second, want.Sub(t0), c.second)
		}
	}
}

func TestSecondTriesAreForgotten(t *testing.T) {
	var tries secondTries
	now := time.Unix(1_000_000, 0)
	for i := range int64(3 * againMost) {
		tries.note(slowRead{readIn: readIn{off: i * againBlock}, id: idA, n: 4096}, now)
	}
	if n := len(tries.now); n != againMost {
		t.Errorf("%d failed reads are remembered, %d at most", n, againMost)
	}
	tries.deadline(idA, 0, now.Add(2*againWithin), now)
	if n := len(tries.now) + len(tries.before); n != 0 {
		t.Errorf("%d failed reads are remembered for ever", n)
	}
}

// TestKernelTriesTwice: a read that fails is sent a second time by the kernel, and that
// one does not get the whole time again.
func TestKernelTriesTwice(t *testing.T) {
	f := onDisk(t, 41, 1<<20)
	f.here = func(int64, int) bool { return false }
	var requests, long atomic.Int64
	const timeout = time.Hour
	down := errors.New("down")
	var noted time.Time
	f.await = func(ctx context.Context, _ int64) error {
		requests.Add(1)
		// A machine on which a second has gone by since then cannot tell.
		if at, _ := ctx.Deadline(); time.Until(at) > timeout/2 && time.Since(noted) < againWithin/2 {
			long.Add(1)
		}
		return down
	}
	files := &memFiles{}
	files.put(idA, f)
	s := start(t, files, Options{ReadTimeout: timeout})
	fd := openRaw(t, filepath.Join(image(t, int64(len(f.data)), s.path(idA), mount.Options{}), "file"))
	noted = time.Now()
	s.tries.note(slowRead{readIn: readIn{off: 0}, id: idA, n: 512 << 10, deadline: noted}, noted)
	if _, err := fd.ReadAt(make([]byte, 4096), 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read of what cannot be had: %v", err)
	}
	if requests.Load() == 0 || long.Load() > 0 {
		t.Errorf("%d of %d requests, for bytes of which a read has just timed out, may take the whole time again", long.Load(), requests.Load())
	}
}
