package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Readers read files all the time, past the page cache, and compare what they
// get with what must be there.
type Readers struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	files  []Checked

	reads   atomic.Int64
	longest atomic.Int64 // nanoseconds, since the last call of Longest
	mu      sync.Mutex
	errs    []error
}

// ErrWrong is in the chain of every error that is about wrong bytes, and of none
// that is about a read that failed.
var ErrWrong = errors.New("wrong bytes")

// mostErrors bounds what Readers remember.
const mostErrors = 1000

// Checked is a file with its content.
type Checked struct {
	Path string
	Data []byte
}

// StartReaders starts n of them. Stop ends them.
func StartReaders(n int, files []Checked) *Readers {
	ctx, cancel := context.WithCancel(context.Background())
	r := &Readers{cancel: cancel, files: files}
	for i := range n {
		r.wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			buf := make([]byte, 128<<10)
			for ctx.Err() == nil {
				r.one(rng, buf)
			}
		})
	}
	return r
}

// Reads is how many reads have ended.
func (r *Readers) Reads() int64 { return r.reads.Load() }

// Longest is the time that the longest read took since the last call.
func (r *Readers) Longest() time.Duration { return time.Duration(r.longest.Swap(0)) }

// Stop ends the readers, and returns what went wrong: the first mostErrors of it.
func (r *Readers) Stop() []error {
	r.cancel()
	r.wg.Wait()
	return r.errs
}

func (r *Readers) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.errs) < mostErrors {
		r.errs = append(r.errs, err)
	}
}

// one opens a file, reads a part of it, and forgets it.
func (r *Readers) one(rng *rand.Rand, buf []byte) {
	f := r.files[rng.IntN(len(r.files))]
	began := time.Now()
	file, err := os.Open(f.Path)
	if err != nil {
		r.fail(err)
		return
	}
	defer file.Close()
	n := min(len(f.Data), 1+rng.IntN(len(buf)))
	off := int64(rng.IntN(len(f.Data) - n + 1))
	got, err := file.ReadAt(buf[:n], off)
	took := time.Since(began)
	switch {
	case err != nil && (!errors.Is(err, io.EOF) || got < n):
		r.fail(fmt.Errorf("%d bytes at %d: %w", n, off, err))
	case !bytes.Equal(buf[:n], f.Data[off:off+int64(n)]):
		r.fail(fmt.Errorf("%s: %d bytes at %d: %w", f.Path, n, off, ErrWrong))
	}
	r.reads.Add(1)
	for {
		was := r.longest.Load()
		if int64(took) <= was || r.longest.CompareAndSwap(was, int64(took)) {
			break
		}
	}
	// So that the next one does not get it from the page cache.
	_ = unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)
}
