package fusefs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// TestHungReadsHoldNothing has far more reads of one diff wait than fit into the
// memory for answers, and than the kernel gives out by default, and reads others: one
// that is local, and one whose bytes are missing but at hand. The first diff's bytes
// come only when all of these have been answered.
func TestHungReadsHoldNothing(t *testing.T) {
	const readers = 300
	hung, local, missing := onDisk(t, 31, 8<<20), onDisk(t, 32, 1<<20), onDisk(t, 33, 1<<20)
	open := make(chan struct{})
	var waiting sync.WaitGroup
	waiting.Add(readers)
	never := func(int64, int) bool { return false }
	hung.here, missing.here = never, never
	hung.await = func(ctx context.Context, _ int64) error {
		waiting.Done()
		<-open
		return nil
	}
	idC := blockdev.Sum([]byte("C"))
	files := &memFiles{}
	files.put(idA, hung)
	files.put(idB, local)
	files.put(idC, missing)
	s := start(t, files, Options{Loops: 2, SlowBytes: MaxRead})
	// Reads through EROFS are the kernel's background requests; others are not.
	f := openRaw(t, filepath.Join(image(t, int64(len(hung.data)), s.path(idA), mount.Options{}), "file"))
	if err := unix.Fadvise(int(f), 0, 0, unix.FADV_RANDOM); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			buf := make([]byte, 4096)
			off := int64(i) * 16 << 10
			if _, err := f.ReadAt(buf, off); err != nil || !bytes.Equal(buf, hung.data[off:off+4096]) {
				t.Errorf("read of the hung diff: %v, or other bytes", err)
			}
		})
	}
	within(t, "reads that the kernel should give out", waiting.Wait)
	for what, c := range map[string]struct {
		id   blockdev.Digest
		data []byte
	}{"local": {idB, local.data}, "missing": {idC, missing.data}} {
		path := filepath.Join(image(t, int64(len(c.data)), s.path(c.id), mount.Options{}), "file")
		within(t, what+" bytes of another diff", func() {
			buf := make([]byte, len(c.data))
			if _, err := openRaw(t, path).ReadAt(buf, 0); err != nil || !bytes.Equal(buf, c.data) {
				t.Errorf("%s: %v, or other bytes", what, err)
			}
		})
	}
	// A read that was answered a moment ago may still be counted.
	within(t, "the count of waiting reads", func() {
		for s.Waiting(0)[0] != readers {
			time.Sleep(time.Millisecond)
		}
	})
	close(open)
	within(t, "hung reads", wg.Wait)
}

// TestLoopQueue: a loop device gives out so many reads of a diff at a time, of a file that
// the kernel reads directly it gives out all. docs/limits.md says what that means.
func TestLoopQueue(t *testing.T) {
	depth := 128 // the kernel's default
	if b, err := os.ReadFile("/sys/module/loop/parameters/hw_queue_depth"); err == nil {
		if depth, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			t.Fatal(err)
		}
	}
	readers := depth + 64
	for name, c := range map[string]struct {
		o    mount.Options
		want int // readers that wait here
	}{
		"file": {mount.Options{}, readers},
		"loop": {mount.Options{Loop: true}, depth},
	} {
		t.Run(name, func(t *testing.T) {
			open := make(chan struct{})
			var now, most atomic.Int64
			hung := &memFile{data: make([]byte, readers*16<<10)}
			hung.await = func(context.Context, int64) error {
				n := now.Add(1)
				defer now.Add(-1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				<-open
				return nil
			}
			files := &memFiles{}
			files.put(idA, hung)
			s := start(t, files, Options{})
			f := openRaw(t, filepath.Join(image(t, hung.Size(), s.path(idA), c.o), "file"))
			if err := unix.Fadvise(int(f), 0, 0, unix.FADV_RANDOM); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i := range readers {
				wg.Go(func() {
					if _, err := f.ReadAt(make([]byte, 4096), int64(i)*16<<10); err != nil {
						t.Error(err)
					}
				})
			}
			within(t, "reads that the kernel should give out", func() {
				for now.Load() < int64(c.want) {
					time.Sleep(time.Millisecond)
				}
			})
			close(open)
			within(t, "all reads", wg.Wait)
			if n := most.Load(); n != int64(c.want) {
				t.Errorf("%d reads have waited here at a time, want %d; do the documented limits still hold?", n, c.want)
			}
		})
	}
}

// lineServer is a Server whose reads come from the test and whose answers go nowhere.
func lineServer(t *testing.T) *Server {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = null.Close() })
	s, err := New(null, &memFiles{}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *Server) addRead(ctx context.Context, n uint64, id blockdev.Digest, f File, deadline time.Time) error {
	r := slowRead{readIn: readIn{unique: n, size: 4096}, slot: make(slot, slotSize), id: id, file: f, n: 4096, deadline: deadline}
	return s.slow.add(ctx, r)
}

// TestLineIsShared: a diff whose reads hang has so many of them waiting and no more;
// the rest fail at once, and those of another diff are answered.
func TestLineIsShared(t *testing.T) {
	s := lineServer(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	hung := &memFile{data: make([]byte, 4096), await: func(ctx context.Context, _ int64) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}}
	later := time.Now().Add(time.Hour)
	var err error
	n := uint64(0)
	for ; n < 2*maxLine && err == nil; n++ {
		err = s.addRead(ctx, n, idA, hung, later)
	}
	if !errors.Is(err, errLineFull) || n < maxLine/4 || n > maxLine*3/4 {
		t.Fatalf("%d reads of one diff were taken before %v", n, err)
	}
	if w := s.Waiting(0)[0]; uint64(w) != n-1 {
		t.Errorf("%d reads are said to wait, %d do", w, n-1)
	}
	other := &memFile{data: make([]byte, 4096)}
	answered := make(chan struct{})
	other.await = func(context.Context, int64) error { close(answered); return nil }
	if err := s.addRead(ctx, n, idB, other, later); err != nil {
		t.Fatal(err)
	}
	within(t, "the read of another diff", func() { <-answered })
	cancel(errStopped)
	within(t, "the end", s.slow.stop)
	if f := s.Failed(); f != 0 {
		t.Errorf("%d reads were failed by a server that was told to stop: the next one is to answer them", f)
	}
}

// TestDeadlineInLine: reads that hang are failed when their time is up, also those that
// had no goroutine until then.
func TestDeadlineInLine(t *testing.T) {
	s := lineServer(t)
	var told atomic.Int64
	s.opts.Failed = func(id blockdev.Digest, why error) {
		if id != idA || !errors.Is(why, errTimeout) {
			t.Errorf("observed: %v, %v", id, why)
		}
		told.Add(1)
	}
	hung := &memFile{data: make([]byte, 4096), await: func(ctx context.Context, _ int64) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}}
	const reads = 2 * maxActive
	deadline := time.Now().Add(time.Second)
	for i := range uint64(reads) {
		if err := s.addRead(t.Context(), i, idA, hung, deadline); err != nil {
			t.Fatal(err)
		}
	}
	within(t, "reads whose time is up", func() {
		for s.Waiting(0)[0] > 0 {
			time.Sleep(time.Millisecond)
		}
	})
	if f := s.Failed(); f != reads || told.Load() != reads {
		t.Errorf("%d reads failed and %d were observed, want %d", f, told.Load(), reads)
	}
	s.slow.stop()
}

// TestAnswerMemory: what a buffer takes is counted, and not what is read into it; and
// who waits for memory gets it when another gives it back.
func TestAnswerMemory(t *testing.T) {
	s := lineServer(t)
	s.slow = newSlowReads(s, MaxRead)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	first, second := answerMemory{s: s, n: smallRead + 1}, answerMemory{s: s, n: 1}
	if p, err := first.Take(t.Context(), first.n, blockdev.FromLocal); err != nil || len(p) != first.n {
		t.Fatalf("%d bytes, %v", len(p), err)
	}
	if _, err := second.Take(ended, 1, blockdev.FromLocal); !errors.Is(err, context.Canceled) {
		t.Fatalf("there is memory beyond the limit, or %v", err)
	}
	second.Give() // nothing
	first.Give()
	if _, err := second.Take(t.Context(), 1, blockdev.FromLocal); err != nil {
		t.Fatal(err)
	}
	second.Give()
}

// limits reads those of a connection off fusectl.
func limits(t *testing.T, ctl int, minor uint32) (two [2]int) {
	t.Helper()
	for i, name := range limitFiles {
		var err error
		if two[i], err = readControl(ctl, fmt.Sprintf("%d/%s", minor, name)); err != nil {
			t.Fatal(err)
		}
	}
	return two
}

// TestWiden: a connection has the limits that the slots of requests are made for; one
// that an earlier version has opened gets them.
func TestWiden(t *testing.T) {
	if maxBackground > pendingSlots {
		t.Fatalf("the kernel gives out %d requests, there are %d slots", maxBackground, pendingSlots)
	}
	s := start(t, &memFiles{}, Options{})
	init, err := s.Init(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(s.dir, &st); err != nil {
		t.Fatal(err)
	}
	minor := unix.Minor(st.Dev)
	ctl, err := mountControl()
	if err != nil {
		t.Skip("needs a kernel with fusectl: ", err)
	}
	defer unix.Close(ctl)
	want := [2]int{maxBackground, maxBackground}
	if got := limits(t, ctl, minor); got != want {
		t.Errorf("a new connection has limits %v, want %v", got, want)
	}
	old := [2]int{128, 96}
	for i, name := range limitFiles {
		if err := writeControl(ctl, fmt.Sprintf("%d/%s", minor, name), old[i]); err != nil {
			t.Fatal(err)
		}
	}
	if got := limits(t, ctl, minor); got != old {
		t.Fatalf("the limits of an earlier version are %v, want %v", got, old)
	}
	if err := Widen(init, minor); err != nil {
		t.Fatal(err)
	}
	if got := limits(t, ctl, minor); got != old {
		t.Errorf("a connection that has been opened with our limits was set to %v", got)
	}
	a, err := parseAgreement(init)
	if err != nil {
		t.Fatal(err)
	}
	binary.NativeEndian.PutUint16(a.answer[initOutLimits:], 128) // a part of init
	if err := Widen(init, minor); err != nil {
		t.Fatal(err)
	}
	if got := limits(t, ctl, minor); got != want {
		t.Errorf("an old connection has limits %v, want %v", got, want)
	}
	if err := Widen(init, minor+100_000); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a connection that does not exist: %v", err)
	}
}

// TestOldLimits: an agreement with the limits of an earlier version is the same
// protocol.
func TestOldLimits(t *testing.T) {
	s := start(t, &memFiles{}, Options{})
	init, err := s.Init(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a, err := parseAgreement(init)
	if err != nil {
		t.Fatal(err)
	}
	old := bytes.Clone(a.answer)
	binary.NativeEndian.PutUint16(old[initOutLimits:], 128)
	binary.NativeEndian.PutUint16(old[initOutLimits+2:], 96)
	if !a.same(old) {
		t.Error("other limits are taken for another protocol")
	}
	old[initOutMaxWrite]++
	if a.same(old) {
		t.Error("another max_write is taken for the same protocol")
	}
}
