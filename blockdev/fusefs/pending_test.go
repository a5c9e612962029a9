package fusefs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

func newPending(t testing.TB) *os.File {
	t.Helper()
	f, err := NewPending()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// Environment of the process that TestKilled kills: descriptor 3 is /dev/fuse, 4
// the table, 5 what has been agreed on, 6 the data of the file.
const servesFor = "SHOAL_TEST_SERVES"

// serveForTest is what TestKilled kills.
func serveForTest() error {
	init, err := io.ReadAll(os.NewFile(5, "init"))
	if err != nil {
		return err
	}
	local := os.NewFile(6, "data")
	fi, err := local.Stat()
	if err != nil {
		return err
	}
	f := &memFile{data: make([]byte, fi.Size()), local: local}
	if _, err := local.ReadAt(f.data, 0); err != nil {
		return err
	}
	f.here = func(off int64, _ int) bool { return off/65536%2 == 0 }
	f.read = func(_ context.Context, p []byte, off int64) (int, error) {
		time.Sleep(time.Duration(rand.IntN(5)) * time.Millisecond) // as if from far away
		return copy(p, f.data[off:]), nil
	}
	files := &memFiles{}
	files.put(idA, f)
	s, err := New(os.NewFile(3, "fuse"), files, Options{Init: init, Pending: os.NewFile(4, "pending"), noResend: true})
	if err != nil {
		return err
	}
	if err := s.Resume(); err != nil {
		return err
	}
	return s.Serve(context.Background())
}

// TestKilled kills -9 the serving process again and again while others read, on a
// kernel that repeats nothing. Each read is answered, by some process, with the
// right bytes.
func TestKilled(t *testing.T) {
	const size = 4 << 20
	f := onDisk(t, 40, size)
	files := &memFiles{}
	files.put(idA, f)
	s := start(t, files, Options{})
	init, err := s.Init(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var fds []rawFile
	for range 6 {
		fds = append(fds, openRaw(t, s.path(idA)))
	}
	s.stop()
	table := newPending(t)

	ctx, cancel := context.WithCancel(t.Context())
	var reads, failed atomic.Int64
	var wg sync.WaitGroup
	for g, fd := range fds {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(41, uint64(g)))
			buf := make([]byte, 200_000)
			for ctx.Err() == nil {
				n, off := 1+rng.IntN(len(buf)), rng.Int64N(size-int64(len(buf)))
				if _, err := fd.ReadAt(buf[:n], off); err != nil || !bytes.Equal(buf[:n], f.data[off:off+int64(n)]) {
					failed.Add(1)
					t.Errorf("%d bytes at %d: %v, or other bytes", n, off, err)
					return
				}
				reads.Add(1)
			}
		})
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for round := range 10 {
		agreed, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := agreed.WriteAt(init, 0); err != nil {
			t.Fatal(err)
		}
		child := exec.CommandContext(t.Context(), self)
		child.Env = append(os.Environ(), servesFor+"=1")
		child.ExtraFiles = []*os.File{s.fd, table, agreed, f.local}
		child.Stderr = os.Stderr
		before := reads.Load()
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		within(t, "reads", func() {
			for reads.Load() < before+50 && failed.Load() == 0 {
				time.Sleep(time.Millisecond)
			}
		})
		time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond) // the moment is the point of it
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = child.Wait() // killed
		_ = agreed.Close()
		if round == 9 {
			break
		}
		p, err := openPending(table)
		if err != nil {
			t.Fatal(err)
		}
		left += len(p.left)
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}
	cancel()
	s.serve(files, Options{Init: init, Pending: table, noResend: true})
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	within(t, "reads at the end", wg.Wait)
	s.stop()
	p, err := openPending(table)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if len(p.left) > 0 {
		t.Errorf("%d requests are still noted when all have been answered", len(p.left))
	}
	if left == 0 {
		t.Error("no kill has left anything to answer: nothing was tested")
	}
	t.Logf("%d reads; the kills left %d requests; %d slots were used", reads.Load(), left, p.used)
}

// TestPendingTable: what is taken is noted, what is given back is not, and the table
// of an earlier process is read as it was left.
func TestPendingTable(t *testing.T) {
	f := newPending(t)
	p, err := openPending(f)
	if err != nil {
		t.Fatal(err)
	}
	var slots []slot
	for i := range 5 {
		s := p.take()
		binary.NativeEndian.PutUint32(s, uint32(inHeaderSize+i))
		slots = append(slots, s)
	}
	p.give(slots[1])
	p.give(slots[3])
	if err := p.close(); err != nil {
		t.Fatal(err)
	}
	if p, err = openPending(f); err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if len(p.left) != 3 || *p.left[1].length() != inHeaderSize+2 {
		t.Errorf("%d requests are left, want 3", len(p.left))
	}
	seen := map[*byte]bool{}
	for _, s := range p.left {
		seen[&s[0]] = true
	}
	n := 0
	for s := p.take(); s != nil; s = p.take() {
		if seen[&s[0]] || *s.length() != 0 {
			t.Fatal("a slot that is in use was given out")
		}
		seen[&s[0]] = true
		n++
	}
	if n != pendingSlots-3 {
		t.Errorf("%d slots, want %d", n, pendingSlots-3)
	}
	for _, spoil := range []func(*os.File) error{
		func(f *os.File) error { _, err := f.WriteAt([]byte("X"), 3); return err },
		func(f *os.File) error {
			_, err := f.WriteAt(bytes.Repeat([]byte{0xff}, 4), int64(pendingUsed))
			return err
		},
	} {
		f := newPending(t)
		if err := spoil(f); err != nil {
			t.Fatal(err)
		}
		if err := CheckPending(f); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("a damaged table: %v", err)
		}
	}
	if err := unix.Ftruncate(int(f.Fd()), 100); err == nil {
		t.Error("the table can be cut under those who have it mapped")
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := CheckPending(null); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("/dev/null is taken for a table: %v", err)
	}
}
