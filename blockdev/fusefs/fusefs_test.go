package fusefs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/mount"
)

var (
	idA = blockdev.Sum([]byte("a"))
	idB = blockdev.Sum([]byte("b"))
)

func TestNames(t *testing.T) {
	files := &memFiles{}
	a, b := onDisk(t, 1, 10_000), onDisk(t, 2, 4096)
	files.put(idA, a)
	files.put(idB, b)
	s := start(t, files, Options{})

	entries, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	want := []string{idA.Hex(), idB.Hex()}
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Errorf("names are %v, want %v", names, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(s.path(idA), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 12288 || st.Mode != unix.S_IFREG|0o400 || st.Ino != nodeID(idA) {
		t.Errorf("size %d, mode %o, ino %d", st.Size, st.Mode, st.Ino)
	}
	for _, name := range []string{"x", idA.Hex()[:63], idA.Hex() + "0", "ABC" + idA.Hex()[3:], blockdev.Sum(nil).Hex()} {
		if err := unix.Stat(filepath.Join(s.dir, name), &st); !errors.Is(err, unix.ENOENT) {
			t.Errorf("stat %s: %v, want ENOENT", name, err)
		}
	}
	if _, err := unix.Open(s.path(idA), unix.O_RDWR, 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("open for writing: %v, want EROFS", err)
	}
	if init, err := s.Init(t.Context()); err != nil || len(init) == 0 {
		t.Error("FUSE_INIT was not kept")
	}
}

// TestRead reads any range of files that are local, missing or mixed.
func TestRead(t *testing.T) {
	const size = 3<<20 + 777
	odd := func(off int64, n int) bool { return off/65536%2 == 1 && (off+int64(n)-1)/65536 == off/65536 }
	for name, change := range map[string]func(*memFile){
		"local":   func(*memFile) {},
		"missing": func(f *memFile) { f.here = func(int64, int) bool { return false } },
		"mixed":   func(f *memFile) { f.here = odd },
	} {
		t.Run(name, func(t *testing.T) {
			f := onDisk(t, 3, size)
			change(f)
			files := &memFiles{}
			files.put(idA, f)
			s := start(t, files, Options{})
			want := make([]byte, fileLength(size))
			copy(want, f.data)
			within(t, "read", func() {
				var wg sync.WaitGroup
				for g := range 4 {
					wg.Go(func() {
						fd := openRaw(t, s.path(idA))
						rng := rand.New(rand.NewPCG(4, uint64(g)))
						for range 100 {
							off := rng.Int64N(int64(len(want)) + 5000)
							buf := make([]byte, rng.IntN(1+1<<(rng.IntN(22))))
							n, err := fd.ReadAt(buf, off)
							w := want[min(off, int64(len(want))):]
							w = w[:min(len(w), len(buf))]
							if !bytes.Equal(buf[:n], w) {
								t.Errorf("%d bytes at %d: got %d, want %d, or other bytes", len(buf), off, n, len(w))
								return
							}
							if err != nil && !errors.Is(err, io.EOF) {
								t.Errorf("%d bytes at %d: %v", len(buf), off, err)
								return
							}
						}
					})
				}
				wg.Wait()
			})
		})
	}
}

// TestUnsettled: what is local and not on stable storage comes from the File itself, which
// looks at it, and never from its file.
func TestUnsettled(t *testing.T) {
	needRoot(t)
	f := onDisk(t, 1, 2<<20)
	f.unsettled = true
	if err := os.Truncate(f.local.Name(), 0); err != nil { // what the kernel has lost
		t.Fatal(err)
	}
	if err := os.Truncate(f.local.Name(), f.Size()); err != nil {
		t.Fatal(err)
	}
	files := &memFiles{}
	files.put(idA, f)
	s := start(t, files, Options{})
	got, err := os.ReadFile(s.path(idA))
	if err != nil || !bytes.Equal(got, f.data) {
		t.Errorf("wrong bytes, or %v", err)
	}
}

// TestImage reads through EROFS, in all ways in which it may send reads.
func TestImage(t *testing.T) {
	for name, o := range map[string]mount.Options{"file": {}, "loop": {Loop: true}} {
		t.Run(name, func(t *testing.T) {
			const size = 5<<20 + 512
			f := onDisk(t, 5, size)
			f.here = func(off int64, n int) bool { return off > 1<<20 }
			files := &memFiles{}
			files.put(idA, f)
			s := start(t, files, Options{})
			dir := image(t, size, s.path(idA), o)
			within(t, "read", func() {
				got, err := os.ReadFile(filepath.Join(dir, "file"))
				if err != nil || !bytes.Equal(got, f.data) {
					t.Errorf("file: %d bytes, %v, or other bytes", len(got), err)
				}
				got, err = os.ReadFile(filepath.Join(dir, "half"))
				if err != nil || !bytes.Equal(got, f.data[size/2&^511:]) {
					t.Errorf("half: %d bytes, %v, or other bytes", len(got), err)
				}
			})
		})
	}
}

// TestOneThread runs everything, the EROFS mount included, on one CPU of Go's.
func TestOneThread(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	TestImage(t)
}

// TestSlowDoesNotBlock has more reads wait than there are loops, and reads
// something else meanwhile.
func TestSlowDoesNotBlock(t *testing.T) {
	slow, fast := onDisk(t, 6, 1<<20), onDisk(t, 7, 1<<20)
	open := make(chan struct{})
	var waiting sync.WaitGroup
	const readers = 24
	waiting.Add(readers)
	slow.here = func(int64, int) bool { return false }
	slow.read = func(ctx context.Context, p []byte, off int64) (int, error) {
		waiting.Done()
		<-open
		return copy(p, slow.data[off:]), nil
	}
	files := &memFiles{}
	files.put(idA, slow)
	files.put(idB, fast)
	s := start(t, files, Options{Loops: 2})
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			buf := make([]byte, 4096)
			off := int64(i) * 8192
			if _, err := openRaw(t, s.path(idA)).ReadAt(buf, off); err != nil || !bytes.Equal(buf, slow.data[off:off+4096]) {
				t.Errorf("slow read: %v, or other bytes", err)
			}
		})
	}
	within(t, "slow reads", waiting.Wait)
	within(t, "fast read", func() {
		buf := make([]byte, len(fast.data))
		if _, err := openRaw(t, s.path(idB)).ReadAt(buf, 0); err != nil || !bytes.Equal(buf, fast.data) {
			t.Errorf("fast read: %v, or other bytes", err)
		}
	})
	close(open)
	within(t, "slow reads", wg.Wait)
}

// TestSlowIsBounded has many reads wait; the bytes they hold never exceed the
// limit, and all are answered.
func TestSlowIsBounded(t *testing.T) {
	const most = MaxRead
	f := onDisk(t, 8, 8<<20)
	var held, peak atomic.Int64
	f.here = func(int64, int) bool { return false }
	f.read = func(ctx context.Context, p []byte, off int64) (int, error) {
		now := held.Add(int64(len(p)))
		defer held.Add(-int64(len(p)))
		for {
			old := peak.Load()
			if old >= now || peak.CompareAndSwap(old, now) {
				break
			}
		}
		runtime.Gosched()
		return copy(p, f.data[off:]), nil
	}
	files := &memFiles{}
	files.put(idA, f)
	s := start(t, files, Options{SlowBytes: most})
	within(t, "reads", func() {
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				buf := make([]byte, len(f.data))
				if _, err := openRaw(t, s.path(idA)).ReadAt(buf, 0); err != nil || !bytes.Equal(buf, f.data) {
					t.Errorf("read: %v, or other bytes", err)
				}
			})
		}
		wg.Wait()
	})
	if p := peak.Load(); p > most || p == 0 {
		t.Errorf("%d bytes were held at one time, limit %d", p, most)
	}
}

func TestErrors(t *testing.T) {
	f := onDisk(t, 9, 1<<20)
	f.here = func(int64, int) bool { return false }
	f.read = func(ctx context.Context, p []byte, off int64) (int, error) {
		switch off {
		case 0:
			return 0, blockdev.ErrUnavailable
		case 4096: // nobody answers
			<-ctx.Done()
			return 0, context.Cause(ctx)
		case 8192: // a File that is wrong about its length must not become zeros
			return 100, io.EOF
		default:
			return copy(p, f.data[off:]), nil
		}
	}
	files := &memFiles{}
	files.put(idA, f)
	s := start(t, files, Options{ReadTimeout: 50 * time.Millisecond})
	fd := openRaw(t, s.path(idA))
	buf := make([]byte, 4096)
	within(t, "reads", func() {
		for off := int64(0); off <= 8192; off += 4096 {
			if _, err := fd.ReadAt(buf, off); !errors.Is(err, unix.EIO) {
				t.Errorf("read at %d: %v, want EIO", off, err)
			}
		}
		if _, err := fd.ReadAt(buf, 12288); err != nil {
			t.Errorf("read after errors: %v", err)
		}
	})
	// A local file that has been closed, as of a diff that is being removed: the
	// bytes come the other way.
	g := onDisk(t, 10, 8192)
	_ = g.local.Close()
	files.put(idB, g)
	if n, err := openRaw(t, s.path(idB)).ReadAt(buf, 0); err != nil || !bytes.Equal(buf[:n], g.data[:4096]) {
		t.Errorf("read of a closed file: %v", err)
	}
}

// TestRemoved reads a file that is not there any more.
func TestRemoved(t *testing.T) {
	files := &memFiles{}
	files.put(idA, onDisk(t, 11, 8192))
	s := start(t, files, Options{})
	fd := openRaw(t, s.path(idA))
	files.put(idA, nil)
	if _, err := fd.ReadAt(make([]byte, 10), 0); err == nil {
		t.Error("a removed diff could be read")
	}
}

// TestCollision has two diffs whose DiffIDs begin with the same 8 bytes.
func TestCollision(t *testing.T) {
	twin := idA
	twin[20]++
	twin[9]++
	files := &memFiles{}
	a, b := onDisk(t, 12, 8192), onDisk(t, 13, 8192)
	files.put(idA, a)
	files.put(twin, b)
	s := start(t, files, Options{})
	fd := openRaw(t, s.path(idA))
	if _, err := unix.Open(s.path(twin), unix.O_RDONLY, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("open of the second: %v, want EIO", err)
	}
	// The first goes, the second comes, and the old handle does not see it.
	files.put(idA, nil)
	buf := make([]byte, 8192)
	if _, err := openRaw(t, s.path(twin)).ReadAt(buf, 0); err != nil || !bytes.Equal(buf, b.data) {
		t.Errorf("second after the first has gone: %v, or other bytes", err)
	}
	if n, err := fd.ReadAt(buf, 0); err == nil {
		t.Errorf("old handle read %d bytes", n)
	}
}

// TestUnusableIDs: node ids that mean something else are not given out.
func TestUnusableIDs(t *testing.T) {
	root, none, last := blockdev.Digest{7: 1}, blockdev.Digest{}, blockdev.Digest{}
	for i := range 8 {
		last[i] = 0xff
	}
	files := &memFiles{}
	for _, id := range []blockdev.Digest{root, none, last, idA} {
		files.put(id, onDisk(t, 14, 4096))
	}
	s := start(t, files, Options{})
	var st unix.Stat_t
	for _, id := range []blockdev.Digest{root, none, last} {
		if err := unix.Stat(s.path(id), &st); !errors.Is(err, unix.EIO) {
			t.Errorf("stat %v: %v, want EIO", id, err)
		}
	}
	if entries, err := os.ReadDir(s.dir); err != nil || len(entries) != 1 {
		t.Errorf("%d entries, %v", len(entries), err)
	}
}

// TestTwoMounts serves two connections in one process.
func TestTwoMounts(t *testing.T) {
	for range 2 {
		files := &memFiles{}
		f := onDisk(t, 15, 100_000)
		files.put(idA, f)
		s := start(t, files, Options{})
		buf := make([]byte, len(f.data))
		if _, err := openRaw(t, s.path(idA)).ReadAt(buf, 0); err != nil || !bytes.Equal(buf, f.data) {
			t.Errorf("read: %v, or other bytes", err)
		}
	}
}

// TestServerGone closes the last descriptor while a read waits and another one
// comes.
func TestServerGone(t *testing.T) {
	f := onDisk(t, 16, 1<<20)
	waits := make(chan struct{})
	f.here = func(off int64, n int) bool { return off < 65536 }
	f.read = func(ctx context.Context, p []byte, off int64) (int, error) {
		close(waits)
		<-ctx.Done()
		return 0, context.Cause(ctx)
	}
	files := &memFiles{}
	files.put(idA, f)
	s := start(t, files, Options{})
	fd := openRaw(t, s.path(idA))
	failed := make(chan error, 1)
	go func() {
		_, err := fd.ReadAt(make([]byte, 4096), 1<<19)
		failed <- err
	}()
	<-waits
	s.stop()
	if err := s.fd.Close(); err != nil {
		t.Fatal(err)
	}
	within(t, "reads", func() {
		if err := <-failed; err == nil {
			t.Error("a read that nobody answered succeeded")
		}
		if _, err := fd.ReadAt(make([]byte, 4096), 0); err == nil {
			t.Error("a read that nobody gets succeeded")
		}
	})
	if _, err := os.Stat(s.dir); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("the mount is not dead: %v", err)
	}
}

// TestUnmounted: Serve ends by itself when the mount goes.
func TestUnmounted(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	fd, err := Mount(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	srv, err := New(fd, &memFiles{}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(context.Background()) }()
	if err := unix.Access(dir, unix.R_OK); err != nil {
		t.Error(err)
	}
	if err := mount.Unmount(dir); err != nil {
		t.Fatal(err)
	}
	within(t, "Serve", func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if err := srv.Serve(context.Background()); err == nil {
		t.Error("served twice")
	}
}

// TestTakeOver stops a server while reads wait, and lets another one answer them
// on the same descriptor, with nothing but the saved FUSE_INIT, and on a kernel
// that does not repeat requests with the table of those that were worked on.
func TestTakeOver(t *testing.T) {
	t.Run("repeated", func(t *testing.T) { testTakeOver(t, Options{}) })
	t.Run("noted", func(t *testing.T) { testTakeOver(t, Options{Pending: newPending(t), noResend: true}) })
	t.Run("both", func(t *testing.T) { testTakeOver(t, Options{Pending: newPending(t)}) })
	t.Run("neither", func(t *testing.T) { testTakeOver(t, Options{noResend: true}) })
}

func testTakeOver(t *testing.T, o Options) {
	f := onDisk(t, 17, 4<<20)
	var waiting sync.WaitGroup
	const readers = 6
	waiting.Add(readers)
	f.here = func(int64, int) bool { return false }
	f.read = func(ctx context.Context, p []byte, off int64) (int, error) {
		waiting.Done()
		<-ctx.Done()
		return 0, context.Cause(ctx)
	}
	files := &memFiles{}
	files.put(idA, f)
	s := start(t, files, o)
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			buf := make([]byte, 5000)
			off := int64(i) << 19
			_, err := openRaw(t, s.path(idA)).ReadAt(buf, off)
			if o.noResend && o.Pending == nil {
				if err == nil {
					t.Error("a read that nobody knows of was answered")
				}
			} else if err != nil || !bytes.Equal(buf, f.data[off:off+5000]) {
				t.Errorf("read over a change of server: %v, or other bytes", err)
			}
		})
	}
	within(t, "reads", waiting.Wait)
	s.stop()
	saved, err := s.Init(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	after := &memFiles{}
	after.put(idA, &memFile{data: f.data, local: f.local})
	o.Init = saved
	s.serve(after, o)
	if now, err := s.Init(t.Context()); err != nil || !bytes.Equal(now, saved) {
		t.Errorf("the new server does not have the FUSE_INIT of the old one (%v)", err)
	}
	if now, err := parseAgreement(saved); err != nil {
		t.Error(err)
	} else if again, err := s.negotiate(now.request); err != nil || !bytes.Equal(again, now.answer) {
		t.Errorf("the new server agrees to\n%x, the old one to\n%x (%v)", again, now.answer, err)
	}
	if err := s.Resume(); errors.Is(err, blockdev.ErrUnsupported) {
		if o.Pending != nil {
			t.Error("they were noted")
		}
		t.Log("neither the kernel (Linux 6.9) nor anybody else knows them")
		s.stop()
		_ = mount.Detach(s.dir)
		_ = s.fd.Close()
	} else if err != nil {
		t.Error(err)
	}
	within(t, "reads after the change", wg.Wait)
}

// kept makes what a server keeps that was offered all flags and agreed to some.
func kept(flags uint64) []byte {
	b := make([]byte, 104+80)
	in, out := b[:104], b[104:]
	putUint32(in, uint32(len(in)))
	putUint32(in[4:], opInit)
	for i, v := range []uint32{7, 45, 1 << 17, math.MaxUint32, math.MaxUint32} {
		putUint32(in[inHeaderSize+4*i:], v)
	}
	putUint32(out, uint32(len(out)))
	putUint32(out[initOutFlags:], uint32(flags))
	putUint32(out[initOutFlags2:], uint32(flags>>32))
	return b
}

// TestDamagedInit: what was kept of a connection is checked, and binds the next
// server.
func TestDamagedInit(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, init := range [][]byte{{1}, make([]byte, 56), bytes.Repeat([]byte{56, 0, 0, 0}, 14), kept(0)[:104+40]} {
		if _, err := New(null, &memFiles{}, Options{Init: init}); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("FUSE_INIT %v was taken: %v", init, err)
		}
	}
	for _, flags := range []uint64{0, fuse.CAP_ASYNC_READ, fuse.CAP_ASYNC_READ | fuse.CAP_MAX_PAGES, math.MaxUint64} {
		s, err := New(null, &memFiles{}, Options{Init: kept(flags)})
		if err != nil {
			t.Fatal(err)
		}
		a, err := parseAgreement(kept(math.MaxUint64))
		if err != nil {
			t.Fatal(err)
		}
		// The kernel offers everything again; the server keeps to what it had.
		answer, err := s.negotiate(a.request)
		if err != nil {
			t.Fatal(err)
		}
		if now := ^(agreement{nil, answer}).refused(); now&^(flags|fuse.CAP_INIT_EXT) != 0 {
			t.Errorf("agreed to %x, and now to %x", flags, now)
		}
	}
}
