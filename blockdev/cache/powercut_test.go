package cache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ext4Disk is an ext4 file system in a file, that can lose its power: everything
// that was written and not synced is gone at once, as the kernel's own tests do it
// (EXT4_IOC_SHUTDOWN without a flush of the log).
type ext4Disk struct {
	t          *testing.T
	image, dir string
	generation int // of image
}

func newExt4Disk(t *testing.T) *ext4Disk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts ext4 through a loop device")
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("needs mkfs.ext4: ", err)
	}
	base := t.TempDir()
	d := &ext4Disk{t: t, image: filepath.Join(base, "image.0"), dir: filepath.Join(base, "disk")}
	if err := os.WriteFile(d.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.image, 64<<20); err != nil {
		t.Fatal(err)
	}
	d.run(mkfs, "-q", "-F", d.image)
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	d.mount()
	t.Cleanup(func() { d.run("umount", d.dir) })
	return d
}

func (d *ext4Disk) run(name string, args ...string) {
	d.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		d.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

func (d *ext4Disk) mount() {
	d.t.Helper()
	d.run("mount", "-o", "loop,errors=remount-ro", d.image, d.dir)
}

// fail makes ext4 turn read-only, as it does after an error: what it was about to write
// it drops.
func (d *ext4Disk) fail() {
	var st unix.Stat_t
	if err := unix.Stat(d.dir, &st); err != nil {
		d.t.Error(err)
		return
	}
	dev, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err == nil {
		err = os.WriteFile(filepath.Join("/sys/fs/ext4", filepath.Base(dev), "trigger_fs_error"), []byte("test"), 0)
	}
	if err != nil {
		d.t.Errorf("have ext4 report an error: %v", err)
	}
}

// cut takes the power away.
func (d *ext4Disk) cut() {
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Error(err)
		return
	}
	defer f.Close()
	const (
		shutdown   = 0x8004587d // EXT4_IOC_SHUTDOWN
		noLogFlush = 2          // EXT4_GOING_FLAGS_NOLOGFLUSH
	)
	if err := unix.IoctlSetPointerInt(int(f.Fd()), shutdown, noLogFlush); err != nil {
		d.t.Errorf("shut ext4 down: %v", err)
	}
}

// restore gives it back, once nobody has a file open: the journal is replayed, and what
// ext4 has noted of an error is cleared. It is a new disk with the same content, because
// another process on this machine may have a mount namespace in which the old one lives.
func (d *ext4Disk) restore() {
	d.t.Helper()
	d.run("umount", d.dir)
	old := d.image
	d.generation++
	d.image = fmt.Sprintf("%s.%d", strings.TrimSuffix(old, filepath.Ext(old)), d.generation)
	d.run("cp", "--sparse=always", old, d.image)
	if err := os.Remove(old); err != nil {
		d.t.Fatal(err)
	}
	// Status 1: it has mended something.
	var status *exec.ExitError
	if out, err := exec.Command("e2fsck", "-p", d.image).CombinedOutput(); err != nil && (!errors.As(err, &status) || status.ExitCode() > 1) {
		d.t.Fatalf("e2fsck: %v: %s", err, out)
	}
	d.mount()
}

// TestPowerCut: the power goes at random moments, under reads, prefetch and syncs.
// Whatever is believed afterwards is right, and everything reads right.
func TestPowerCut(t *testing.T) {
	disk := newExt4Disk(t)
	testDiskEnds(t, disk, disk.cut)
}

// TestDiskFails is the same with a file system that turns read-only at that moment, and
// goes on to answer reads.
func TestDiskFails(t *testing.T) {
	disk := newExt4Disk(t)
	testDiskEnds(t, disk, disk.fail)
}

// TestOpenRecordLast: the record that the cache is open is on disk when markOpen returns,
// also if the same bytes were written before, and the sync that followed failed.
func TestOpenRecordLast(t *testing.T) {
	disk := newExt4Disk(t)
	path := filepath.Join(disk.dir, openFile)
	boot, next := [16]byte{1}, [16]byte{2}
	if err := os.WriteFile(path, boot[:], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := markOpen(path, boot); err != nil {
		t.Fatal(err)
	}
	disk.cut()
	disk.restore()
	if unclean, err := wasUnclean(path, next); err != nil || !unclean {
		t.Errorf("after a power cut: unclean end %v, %v", unclean, err)
	}
}

func testDiskEnds(t *testing.T, disk *ext4Disk, end func()) {
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	for round := range rounds {
		rng := rand.New(rand.NewPCG(99, uint64(round)))
		r := newRig(t, 6<<20+round, func(c *Config) {
			c.Root = filepath.Join(disk.dir, "cache")
			c.SyncInterval, c.SyncBytes = time.Millisecond, 1<<20
			c.Quiet, c.GiveWay = time.Nanosecond, time.Millisecond
			c.bootID = time.Now().String()
		})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 2 {
			seed := rng.Uint64()
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, 1))
				buf := make([]byte, 100_000)
				for ctx.Err() == nil {
					off := rng.Int64N(r.d.Size() - int64(len(buf)))
					// Right or an error, also on a disk that is gone.
					if n, err := r.d.ReadAt(ctx, buf, off); err == nil && string(buf[:n]) != string(r.want[off:off+int64(n)]) {
						t.Errorf("wrong bytes at %d", off)
					}
				}
			})
		}
		if round%2 == 0 {
			wg.Go(func() { _ = r.d.Prefetch(ctx) }) // fails when the disk does
		}
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond) // the moment is the point of it
		end()
		// Reads go on for a while: the kernel answers some that it should not.
		time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
		cancel()
		wg.Wait()
		r.crash(func() {
			disk.restore()
			r.cfg.bootID = "after " + r.cfg.bootID
		})
		if d, ok := r.Get(r.ix.DiffID); ok { // else it was not durable yet
			r.d = d
			r.present()
			if d.Complete() {
				t.Logf("round %d: complete", round)
			}
		} else {
			r.d = r.add(r.ix)
		}
		r.checkRead(0, int(r.d.Size()))
		r.prefetch()
		if err := r.d.Scrub(t.Context()); err != nil {
			t.Error(err)
		}
		if err := r.Remove(t.Context(), r.d.id); err != nil {
			t.Fatal(err)
		}
		r.close()
		if t.Failed() {
			return
		}
	}
}
