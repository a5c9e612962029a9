package ingest

import (
	"context"
	"io"
	"os"
	"sync"
)

// tail is the part of a spool file that has arrived, between the goroutine that writes
// it and the one that reads it.
type tail struct {
	f *os.File

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when there is more
	length  int64         // bytes that have arrived
	err     error         // why no more come; io.EOF: the blob is complete and checked
}

func newTail(f *os.File, length int64) *tail {
	return &tail{f: f, length: length, changed: make(chan struct{})}
}

// grow says that n more bytes are in the file.
func (t *tail) grow(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.length += int64(n)
	t.wakeLocked()
}

// end says that no more bytes come, and why.
func (t *tail) end(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
		t.wakeLocked()
	}
}

func (t *tail) wakeLocked() {
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *tail) state() (length int64, changed <-chan struct{}, end error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.length, t.changed, t.err
}

// reader reads the file from its start, waiting for what has not come yet.
type reader struct {
	ctx context.Context // of one flight, which outlives no reader
	t   *tail
	off int64
}

// Read implements io.Reader. It returns the tail's error once all that arrived
// before it has been read, io.EOF only after the digest was found right.
func (r *reader) Read(p []byte) (int, error) {
	for {
		length, changed, end := r.t.state()
		if r.off < length {
			if int64(len(p)) > length-r.off {
				p = p[:length-r.off]
			}
			n, err := r.t.f.ReadAt(p, r.off)
			r.off += int64(n)
			if err == io.EOF && n > 0 {
				err = nil
			} else if err == io.EOF {
				err = io.ErrUnexpectedEOF // somebody has cut our file
			}
			return n, err
		}
		if end != nil {
			return 0, end
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
}
