package mirror

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

const (
	// pace is how often a byte of a config goes out at first that is held back:
	// containerd ends a pull for which nothing comes (CRI: image_pull_progress_timeout,
	// 5 minutes). It sees the bytes that it reads of an answer; that a request is
	// being worked on it does not see.
	pace = 2 * time.Second
	// pauses is for how much of the time so far nothing comes, and longest, in units
	// of pace, for how long at the most: small configs have 200 bytes, which are to
	// last for as long as index_timeout may be.
	pauses  = 30
	longest = 30
	// writeTime bounds each write to containerd.
	writeTime = time.Minute
	// maxHeld bounds how many configs are held back at a time, and so the memory
	// for them.
	maxHeld = 256
)

// giveConfig answers with an image's config when the image is open, or when it is
// known that it cannot be. It is asked for when containerd has the manifest and
// nothing else, holds no lock, and has not begun to unpack.
func (m *Mirror) giveConfig(w http.ResponseWriter, r *http.Request, t target, doc *image.Document, manifest blockdev.Digest) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	ready := make(chan struct{})
	go func() {
		defer close(ready)
		m.cfg.Opener.Await(ctx, t.name, manifest)
	}()
	defer func() {
		cancel()
		<-ready
	}()
	from := offset(r, doc.Size)
	h := w.Header()
	h.Set("Content-Length", strconv.FormatInt(doc.Size-from, 10))
	status := http.StatusOK
	if from > 0 {
		status = http.StatusPartialContent
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, doc.Size-1, doc.Size))
	}
	rest := doc.Data[from:]
	select {
	case <-ready:
		w.WriteHeader(status)
		_, _ = w.Write(rest) // the client may have gone
		return
	case <-time.After(m.pace / 2): // most are open already
	}
	select {
	case m.held <- struct{}{}:
		defer func() { <-m.held }()
	default:
		w.WriteHeader(status)
		_, _ = w.Write(rest)
		return
	}
	out := http.NewResponseController(w)
	write := func(b []byte) bool {
		_ = out.SetWriteDeadline(time.Now().Add(writeTime)) // a writer without deadlines has none to pass
		if _, err := w.Write(b); err != nil {
			return false
		}
		return out.Flush() == nil
	}
	w.WriteHeader(status)
	if out.Flush() != nil {
		return
	}
	began := time.Now()
	tick := time.NewTimer(m.pace)
	defer tick.Stop()
	for {
		select {
		case <-ready:
			write(rest)
			return
		case <-ctx.Done():
			return
		case <-tick.C:
			if len(rest) > 1 {
				if !write(rest[:1]) {
					return
				}
				rest = rest[1:]
			}
			tick.Reset(min(max(m.pace, time.Since(began)/pauses), longest*m.pace))
		}
	}
}

// offset is where a request wants a document to begin: containerd goes on where an
// earlier attempt ended.
func offset(r *http.Request, size int64) int64 {
	v, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	if !ok {
		return 0
	}
	v, _, _ = strings.Cut(v, "-")
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n <= 0 || n >= size {
		return 0
	}
	return n
}
