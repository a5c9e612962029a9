package cache

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
)

// lose makes pages of the data file read as the kernel leaves them if it could not write
// them: as a hole.
func (r *rig) lose(off, n int64) {
	r.t.Helper()
	err := disk.Control(r.d.data, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// TestLostPages: what the kernel has dropped because it could not write it is fetched
// again, and no reader gets the zeros that are in its place.
func TestLostPages(t *testing.T) {
	reads := map[string]func(r *rig, off int64, n int){
		"ReadAt": func(r *rig, off int64, n int) { r.checkRead(off, n) },
		"Read": func(r *rig, off int64, n int) {
			r.t.Helper()
			buf := make(given, n)
			if _, err := r.d.Read(r.t.Context(), off, n, buf); err != nil {
				r.t.Fatal(err)
			}
			if string(buf) != string(r.want[off:off+int64(n)]) {
				r.t.Errorf("wrong bytes at %d", off)
			}
		},
	}
	for name, read := range reads {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 1<<20, nil)
			r.checkRead(0, int(r.d.Size()))
			r.quiet()
			if _, ok := r.d.Local(0, 1); ok {
				t.Error("Local hands out what no sync has written")
			}
			// The page in which a chunk ends, of which each chunk has a part only; and one
			// from which a read takes its last bytes.
			end := r.d.tab.Start(2)
			if end%lostUnit == 0 {
				t.Fatal("chunk 2 begins with a page")
			}
			page := end / lostUnit * lostUnit
			r.lose(page, lostUnit)
			read(r, page-100, 200)
			if s := r.Stats(); s.DamagedChunks == 0 {
				t.Error("nobody has noticed the loss")
			}
			read(r, end-10, 20)
			r.lose(10*lostUnit, 3*lostUnit)
			read(r, 0, int(r.d.Size()))
			// What is on stable storage cannot be lost in this way, and is not looked at.
			if err := r.d.sync(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, ok := r.d.Local(0, int(r.d.Size())); !ok {
				t.Error("all is synced, and Local does not say so")
			}
		})
	}
}
