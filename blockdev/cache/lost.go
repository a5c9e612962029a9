package cache

import "bytes"

// lostUnit is what the kernel loses of a file at least, in bytes, and aligned to it: a
// page, the smallest that there is.
const lostUnit = 4096

// checkLost looks at p, which was read at off from the chunks [lo, hi), of which some are
// present and not synced.
//
// A file system that fails to write pages back may drop them, and goes on: ext4 does so
// when it turns read-only after an error, and XFS when a disk fails. From then on a read
// of them gives no error, but what the disk has there: for a file that fills up for the
// first time, a hole, so zeros. Only the next fdatasync learns of it, if one comes.
// So zeros over a page, or over a chunk's part of one, are believed only if the chunk has
// its digest. Content that has such zeros costs a digest for each read until it is synced.
//
// An error says that a chunk of the range is not present any more.
func (d *local) checkLost(p []byte, off int64, lo, hi int) error {
	for i := lo; i < hi; i++ {
		from, to := d.overlap(i, off, len(p))
		part := p[from-off : to-off]
		if d.pres.SyncedAll(i, i+1) || !mayBeLost(part, from) {
			continue
		}
		// The chunk may have been written again since, so that p has what was lost, and
		// the file has not.
		if err := d.reread(part, i, from); err != nil {
			return err
		}
	}
	return nil
}

// reread fills part, which begins at from, from chunk i if the chunk has its digest.
func (d *local) reread(part []byte, i int, from int64) error {
	buf := d.c.buffer()
	defer d.c.buffers.Put(buf)
	b := buf[:d.tab.Length(i)]
	if err := d.readChunk(i, b); err != nil {
		return err
	}
	copy(part, b[from-d.tab.Start(i):])
	return nil
}

// mayBeLost reports whether a part of p that lies in one page of the file has zeros only.
// p begins at off.
func mayBeLost(p []byte, off int64) bool {
	for len(p) > 0 {
		n := min(len(p), int(lostUnit-off%lostUnit))
		if p[0] == 0 && bytes.Equal(p[1:n], p[:n-1]) {
			return true
		}
		p, off = p[n:], off+int64(n)
	}
	return false
}
