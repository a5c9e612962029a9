package fusefs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/erofs"
	"github.com/shoalfs/shoal/blockdev/mount"
	"github.com/shoalfs/shoal/blockdev/mount/mounttest"
)

func TestMain(m *testing.M) {
	if os.Getenv(servesFor) != "" {
		if err := serveForTest(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(mounttest.Main(m))
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE and EROFS")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs FUSE: ", err)
	}
}

// memFile is a file of which a part is local, and the rest comes from read.
type memFile struct {
	data  []byte
	local *os.File // has all of data
	// here says whether a range is local; nil: all of it. unsettled: what is local is not
	// on stable storage.
	here      func(off int64, n int) bool
	unsettled bool
	// await waits for what is not local; nil: it is at hand.
	await func(ctx context.Context, off int64) error
	from  blockdev.Origin // of what is not local
	// read reads what is not local, when it is at hand; nil: data.
	read func(ctx context.Context, p []byte, off int64) (int, error)
}

func (f *memFile) Size() int64 { return int64(len(f.data)) }

func (f *memFile) Read(ctx context.Context, off int64, n int, m blockdev.Memory) (int, error) {
	if f.await != nil {
		if err := f.await(ctx, off); err != nil {
			return 0, err
		}
	}
	p, err := m.Take(ctx, n, f.from)
	if err != nil {
		return 0, err
	}
	if f.read != nil {
		return f.read(ctx, p, off)
	}
	return bytes.NewReader(f.data).ReadAt(p, off)
}

func (f *memFile) Local(off int64, n int) (*os.File, bool) {
	return f.local, !f.unsettled && f.isHere(off, n)
}

func (f *memFile) ReadLocal(p []byte, off int64) bool {
	if !f.isHere(off, len(p)) {
		return false
	}
	clear(p[copy(p, f.data[off:]):])
	return true
}

func (f *memFile) isHere(off int64, n int) bool {
	return f.local != nil && (f.here == nil || f.here(off, n))
}

// memFiles is a directory that changes.
type memFiles struct {
	mu sync.Mutex
	m  map[blockdev.Digest]File
}

func (m *memFiles) Open(id blockdev.Digest) (File, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f, ok := m.m[id]
	return f, ok
}

func (m *memFiles) List() (ids []blockdev.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id := range m.m {
		ids = append(ids, id)
	}
	return ids
}

func (m *memFiles) put(id blockdev.Digest, f File) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f == nil {
		delete(m.m, id)
		return
	}
	if m.m == nil {
		m.m = make(map[blockdev.Digest]File)
	}
	m.m[id] = f
}

// onDisk makes a file with n random bytes, all local.
func onDisk(t testing.TB, seed uint64, n int) *memFile {
	t.Helper()
	f := &memFile{data: blockdevtest.Bytes(seed, n)}
	path := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(path, f.data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, fileLength(int64(n))); err != nil {
		t.Fatal(err)
	}
	local, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = local.Close() })
	f.local = local
	return f
}

// server is a Server that serves.
type server struct {
	*Server
	t    testing.TB
	dir  string
	fd   *os.File
	stop func()
}

// start mounts files and serves them until the test ends.
func start(t testing.TB, files Files, o Options) *server {
	t.Helper()
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "fuse")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	fd, err := Mount(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = mount.Detach(dir)
		_ = fd.Close()
	})
	s := &server{t: t, dir: dir, fd: fd}
	s.serve(files, o)
	return s
}

// serve starts a new Server on the descriptor.
func (s *server) serve(files Files, o Options) {
	s.t.Helper()
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(s.t.Output(), nil))
	}
	srv, err := New(s.fd, files, o)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx) }()
	s.Server = srv
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("Serve: %v", err)
		}
	})
	s.t.Cleanup(s.stop)
}

func (s *server) path(id blockdev.Digest) string { return filepath.Join(s.dir, id.Hex()) }

// rawFile reads a FUSE file of this process. It is no os.File, since os.Open
// would ask the kernel, from inside Go's scheduler, whether the file can be
// polled, and the kernel would ask us.
type rawFile int

func openRaw(t testing.TB, path string) rawFile {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return rawFile(fd)
}

func (f rawFile) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := unix.Pread(int(f), p[n:], off+int64(n))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return n, err
		}
		if m == 0 {
			return n, io.EOF
		}
		n += m
	}
	return n, nil
}

// image writes the metadata of an image that shows data in one file, "file", and
// its second half as "half", and mounts it over the file of a diff.
func image(t testing.TB, size int64, device string, o mount.Options) string {
	t.Helper()
	needRoot(t)
	const dirMode, fileMode = unix.S_IFDIR | 0o755, unix.S_IFREG | 0o644
	blocks := size &^ 511
	half := blocks / 2 &^ 511
	var meta bytes.Buffer
	err := erofs.Write(&meta, &erofs.Inode{Mode: dirMode, Children: []erofs.Dirent{
		{Name: "file", Inode: &erofs.Inode{Mode: fileMode, Size: blocks, Extents: []erofs.Extent{{Length: blocks}}}},
		{Name: "half", Inode: &erofs.Inode{Mode: fileMode, Size: blocks - half, Extents: []erofs.Extent{{DiffOffset: half, Length: blocks - half}}}},
	}}, size)
	if err != nil {
		t.Fatal(err)
	}
	base := t.TempDir()
	dir := filepath.Join(base, "image")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	metaPath := filepath.Join(base, "meta")
	if err := os.WriteFile(metaPath, meta.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := mount.Mount(metaPath, device, dir, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.Unmount(dir); err != nil {
			t.Error(err)
			_ = mount.Detach(dir)
		}
	})
	return dir
}

// within fails the test if f takes longer than any healthy machine would.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal(what + ": hangs")
	}
}
