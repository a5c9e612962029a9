package cache

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
)

// bytesOnDisk is what the files of all diffs take, as the file system counts.
func bytesOnDisk(t testing.TB, root string) (n int64) {
	t.Helper()
	for _, dir := range []string{diffsDir, tmpDir} {
		entries, err := os.ReadDir(filepath.Join(root, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			n += bytesIn(t, filepath.Join(root, dir, e.Name()))
		}
	}
	return n
}

// bytesIn is what a directory and all in it take.
func bytesIn(t testing.TB, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // just removed
		}
		n += st.Blocks * 512
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return n
}

// another adds a diff of its own content.
func (r *rig) another(seed uint64, size int) (*Diff, []byte) {
	r.t.Helper()
	ix, data := blockdevtest.Diff(seed, size)
	r.mem.PutDiff(ix, data)
	return r.add(ix), padded(data)
}

// TestQuotaHolds: prefetch and readers of several diffs that do not fit fill the
// cache, and never more; all that is read is right, and what has been written
// is counted as the disk counts it.
func TestQuotaHolds(t *testing.T) {
	const quota = 24 << 20
	r := newRig(t, 16<<20, func(c *Config) { c.Quota, c.Quiet, c.GiveWay = quota, time.Microsecond, time.Microsecond })
	diffs, want := []*Diff{r.d}, [][]byte{r.want}
	for i := range 3 {
		d, data := r.another(uint64(1000+i), 16<<20+i*1000)
		diffs, want = append(diffs, d), append(want, data)
	}
	stop := make(chan struct{})
	var most atomic.Int64
	var watch, work sync.WaitGroup
	watch.Go(func() {
		for {
			most.Store(max(most.Load(), bytesOnDisk(t, r.cfg.Root)))
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	for i, d := range diffs {
		work.Go(func() {
			if err := d.Prefetch(t.Context()); err != nil && !errors.Is(err, blockdev.ErrNoSpace) {
				t.Error(err)
			}
		})
		work.Go(func() {
			p := make([]byte, 200_000)
			for off := int64(0); off < d.Size(); off += int64(len(p)) {
				n, _ := d.ReadAt(t.Context(), p, off)
				if !bytes.Equal(p[:n], want[i][off:][:n]) || n == 0 {
					t.Errorf("diff %d: wrong bytes at %d", i, off)
					return
				}
			}
		})
	}
	work.Wait()
	close(stop)
	watch.Wait()
	if n := most.Load(); n > quota || n < quota*3/4 {
		t.Errorf("at most %d bytes on disk, the quota is %d", n, quota)
	}
	again := r.log.count("can be written to again") // a removal may give room for a moment
	if r.Stats().NotKept == 0 || r.log.count("the cache is full") != 1+again {
		t.Errorf("%+v; log:\n%s", r.Stats(), r.log.b.String())
	}
	for _, d := range diffs {
		r.room.Remeasure(&d.share)
	}
	slack := int64(len(diffs)) * 3 * r.room.Block // fixedUse
	if used, disk := r.Stats().Used, bytesOnDisk(t, r.cfg.Root); used < disk || used > disk+slack {
		t.Errorf("%d bytes counted, %d on disk", used, disk)
	}
	// The same after a restart, and nothing is left of what is removed.
	used := r.Stats().Used
	r.reopen()
	if n := r.Stats().Used; n < used || n > used+slack || n > quota {
		t.Errorf("%d bytes counted after a restart, %d before", n, used)
	}
	for _, d := range diffs[1:] {
		if err := r.Remove(t.Context(), d.id); err != nil {
			t.Fatal(err)
		}
	}
	r.prefetch()
	if n := r.log.count("can be written to again") - again; n != 0 {
		t.Errorf("a new process that finds room says so %d times", n)
	}
	if err := r.Remove(t.Context(), r.d.id); err != nil {
		t.Fatal(err)
	}
	if n := r.Stats().Used; n != 0 {
		t.Errorf("%d bytes counted of nothing", n)
	}
}

// TestQuotaAtStart: until all that an earlier process has left is counted, nothing
// is added to it; reads are right all the same.
func TestQuotaAtStart(t *testing.T) {
	r := newRig(t, 4<<20, func(c *Config) { c.Quota = 32 << 20 })
	other, _ := r.another(2, 1<<20)
	r.close()
	hold := make(chan struct{})
	r.cfg.decode = func(enc []byte) (*blockdev.Index, error) {
		ix, err := index.Decode(enc)
		if err == nil && ix.DiffID == other.id {
			<-hold
		}
		return ix, err
	}
	var err error
	if r.Cache, err = Open(t.Context(), r.cfg); err != nil {
		t.Fatal(err)
	}
	r.d, _ = r.Get(r.ix.DiffID)
	r.checkRead(0, 1<<20)
	r.quiet()
	if n := r.present(); n != 0 {
		t.Errorf("%d chunks kept before the others are counted", n)
	}
	if n := r.log.count("the cache is full"); n != 0 {
		t.Errorf("called full %d times", n)
	}
	close(hold)
	r.prefetch()
}

// TestQuotaLeavesRoomForIndexes: with a cache that is full of data, an image's
// index still fits, and what its programs read first is kept.
func TestQuotaLeavesRoomForIndexes(t *testing.T) {
	r := newRig(t, 64<<20, func(c *Config) { c.Quota = 32 << 20 })
	if err := r.d.Prefetch(t.Context()); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Fatalf("prefetch beyond the quota: %v", err)
	}
	d, want := r.another(2, 1<<20)
	r.check(d, want, 0, 100_000)
	if n := d.Stat().BytesPresent; n < 100_000 {
		t.Errorf("%d bytes kept", n)
	}
}

// TestMakeRoom: prefetch and Add wait for room to be made; a read does not. What
// MakeRoom removes may be the diff that is being prefetched.
func TestMakeRoom(t *testing.T) {
	var r *rig
	var victims []blockdev.Digest
	r = newRig(t, 12<<20, func(c *Config) {
		c.Quota = 32 << 20
		c.MakeRoom = func(ctx context.Context) bool {
			if len(victims) == 0 {
				return false
			}
			if err := r.Remove(ctx, victims[0]); err != nil {
				t.Error(err)
			}
			victims = victims[1:]
			return true
		}
	})
	r.prefetch()
	victims = []blockdev.Digest{r.d.id}
	next, want := r.another(7, 20<<20)
	if err := next.Prefetch(t.Context()); err != nil {
		t.Fatalf("prefetch with something to remove: %v", err)
	}
	r.check(next, want, 0, len(want))
	if _, ok := r.Get(r.d.id); ok {
		t.Error("the first diff is still there")
	}
	last, _ := r.another(8, 30<<20)
	victims = []blockdev.Digest{last.id}
	if err := last.Prefetch(t.Context()); !errors.Is(err, ErrRemoved) {
		t.Errorf("prefetch that is removed to make room: %v", err)
	}
	big := *r.ix
	big.DiffID = blockdev.Sum([]byte("big"))
	big.Meta = blockdevtest.Bytes(1, 14<<20)
	if _, err := r.Add(t.Context(), encode(t, &big)); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("add beyond the quota: %v", err)
	}
	victims = []blockdev.Digest{next.id}
	r.eventually("an index is added when there is something to remove again", func() bool {
		_, err := r.Add(t.Context(), encode(t, &big))
		return err == nil
	})
}

// TestNotKeptIsFetchedOnce: without room, a program that reads on in small pieces
// has each chunk fetched once all the same.
func TestNotKeptIsFetchedOnce(t *testing.T) {
	r := newRig(t, 8<<20, func(c *Config) { c.Quota = 64 << 10 })
	r.mem.Record()
	for off := int64(0); off < 4<<20; off += 4096 {
		r.checkRead(off, 4096)
	}
	r.quiet()
	var asked int64
	for _, q := range r.mem.Requests() {
		for _, c := range q.Chunks {
			asked += int64(c.Length)
		}
	}
	if asked > 9<<20 {
		t.Errorf("%d bytes asked for to read 4 MiB", asked)
	}
	if n := r.present(); n > 2 {
		t.Errorf("%d chunks kept", n)
	}
}

// TestDiskFilledByOthers: the disk fills up between a look at what it has and a
// write. Nobody but the log notices, and all goes on by itself.
func TestDiskFilledByOthers(t *testing.T) {
	dir := smallDisk(t, 32<<20)
	r := newRig(t, 12<<20, func(c *Config) { c.Root = filepath.Join(dir, "cache") })
	r.checkRead(0, 100_000)
	r.quiet()
	junk := filepath.Join(dir, "junk")
	f, err := os.Create(junk)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 1<<16))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	f.Close()
	r.checkRead(1<<20, 1<<20)
	r.quiet()
	if n := r.log.count("the cache is full"); n != 1 || r.Stats().NotKept == 0 {
		t.Errorf("said %d times; %+v", n, r.Stats())
	}
	if err := os.Remove(junk); err != nil {
		t.Fatal(err)
	}
	r.prefetch()
	r.checkRead(0, len(r.want))
	if n := r.log.count("can be written to again"); n != 1 {
		t.Errorf("the end of it was logged %d times", n)
	}
}

// TestOffer: a chunk that comes by is kept if it is right and missing, and whoever
// waits for it has it.
func TestOffer(t *testing.T) {
	r := newRig(t, 2<<20, nil)
	asked, hold := make(chan struct{}, 1), make(chan struct{})
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		select {
		case asked <- struct{}{}:
		default:
		}
		<-hold
		return r.mem.Fetch(ctx, req, deliver)
	})
	defer close(hold)
	c := r.ix.Chunks[3]
	data := r.data[c.Offset:][:c.Length]
	done := make(chan error)
	go func() {
		p := make([]byte, c.Length)
		_, err := r.d.ReadAt(context.Background(), p, c.Offset)
		if err == nil && !bytes.Equal(p, data) {
			err = errors.New("wrong bytes")
		}
		done <- err
	}()
	<-asked
	r.d.Offer(c.Digest, make([]byte, c.Length))
	r.d.Offer(blockdev.Sum([]byte("no chunk of this diff")), data)
	if n := r.present(); n != 0 || r.Stats().CorruptChunks != 1 {
		t.Errorf("%d chunks present, %+v", n, r.Stats())
	}
	r.d.Offer(c.Digest, data)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := r.present(); n != 1 {
		t.Errorf("%d chunks present", n)
	}
}

// TestFullUse: what a diff takes of the disk is known before any of it is here.
func TestFullUse(t *testing.T) {
	r, _ := newProofRig(t, nil)
	all, inodes, err := r.d.FullUse()
	if err != nil {
		t.Fatal(err)
	}
	r.prove()
	if took := bytesIn(t, filepath.Join(r.cfg.Root, diffsDir, r.d.ID().Hex())); took > all || took < all-24<<10 {
		t.Errorf("it takes %d bytes, and was to take %d", took, all)
	}
	files, err := filepath.Glob(filepath.Join(r.cfg.Root, diffsDir, r.d.ID().Hex(), "*"))
	if err != nil || int64(len(files))+1 != inodes {
		t.Errorf("it has %d files and a directory, and was to have %d inodes; %v", len(files), inodes, err)
	}
	again, _, err := r.d.FullUse()
	if err != nil || again < all-8<<10 || again > all+8<<10 {
		t.Errorf("it says %d bytes once all is here, %d before; %v", again, all, err)
	}
}
