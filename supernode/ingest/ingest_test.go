package ingest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/supernode/store"
)

func TestFormats(t *testing.T) {
	diff := makeTar(t, 1, 3<<20)
	for name, blob := range map[string][]byte{"gzip": gzipped(t, diff), "zstd": zstded(t, diff), "tar": diff} {
		for _, mt := range []string{gzipType, "application/vnd.docker.image.rootfs.diff.tar"} {
			t.Run(name+" as "+mt[len(mt)-8:], func(t *testing.T) {
				f := newFixture(t, Config{})
				l := f.reg.add(blob, diff, mt)
				var last Progress
				rec, err := f.in.Layer(t.Context(), l, func(p Progress) { last = p })
				if err != nil || rec.DiffID != l.DiffID {
					t.Fatal(rec, err)
				}
				if last != (Progress{Layer: l.Digest, Stage: image.StageStored, Fetched: l.Size, Total: l.Size, Unpacked: int64(len(diff))}) {
					t.Errorf("last progress %+v", last)
				}
				checkStored(t, f.st, l, diff)
				if n := f.spoolFiles(t); len(n) > 0 {
					t.Errorf("spool files left: %v", n)
				}
				// Again: no request.
				n := f.reg.requests.Load()
				if _, err := f.in.Layer(t.Context(), l, nil); err != nil || f.reg.requests.Load() != n {
					t.Errorf("second ask: %v, %d requests", err, f.reg.requests.Load()-n)
				}
			})
		}
	}
}

// TestTrailing: what follows a gzip stream and is none belongs to the layer's digest, not
// to its content, and somebody is told.
func TestTrailing(t *testing.T) {
	diff := makeTar(t, 1, 1<<20)
	good := gzipped(t, diff)
	for name, tail := range map[string][]byte{
		"nothing": nil, "five zeros": make([]byte, 5), "a block of zeros": make([]byte, 512),
		"text": []byte("trailing garbage"), "much": bytes.Repeat([]byte("junk"), 1<<20),
	} {
		var log bytes.Buffer
		f := newFixture(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
		l := f.reg.add(append(good[:len(good):len(good)], tail...), diff, gzipType)
		rec, err := f.in.Layer(t.Context(), l, nil)
		if err != nil || rec.DiffID != l.DiffID {
			t.Errorf("%s: %v", name, err)
			continue
		}
		checkStored(t, f.st, l, diff)
		if n := strings.Count(log.String(), "other bytes after its gzip stream"); (n != 1) != (tail == nil) {
			t.Errorf("%s: the log has %d lines about it", name, n)
		}
		// It is hashed.
		f = newFixture(t, Config{})
		l = f.reg.add(append(good[:len(good):len(good)], tail...), diff, gzipType)
		l.Digest[0] ^= 1
		if _, err := f.in.Layer(t.Context(), l, nil); err == nil {
			t.Errorf("%s: taken with another digest", name)
		}
	}
}

func TestRefused(t *testing.T) {
	diff := makeTar(t, 1, 1<<20)
	good := gzipped(t, diff)
	flipped := append([]byte(nil), good...)
	flipped[len(flipped)/2] ^= 1
	bomb := newBigWindow()
	for _, c := range []struct {
		name, mediaType string
		blob            []byte
		change          func(*Layer)
		want            error
		text            string
	}{
		{name: "encrypted", mediaType: gzipType + "+encrypted", blob: good, want: blockdev.ErrUnsupported, text: "encrypted"},
		{name: "schema 1", mediaType: schema1Type, blob: good, want: blockdev.ErrUnsupported, text: "schema 1"},
		{name: "media type", mediaType: "application/x-iso9660", blob: good, want: blockdev.ErrUnsupported, text: "x-iso9660"},
		{name: "xz", mediaType: gzipType, blob: []byte("\xfd7zXZ\x00 and so on"), want: blockdev.ErrUnsupported, text: "xz"},
		{name: "window", mediaType: gzipType, blob: bomb, want: blockdev.ErrUnsupported, text: "window"},
		{name: "no tar", mediaType: gzipType, blob: gzipped(t, []byte(strings.Repeat("not a tar ", 1000))), want: blockdev.ErrCorrupt},
		{name: "truncated", mediaType: gzipType, blob: good[:len(good)-100], want: blockdev.ErrCorrupt},
		{name: "flipped", mediaType: gzipType, blob: flipped, want: blockdev.ErrCorrupt},
		{name: "a second member that is cut off", mediaType: gzipType, blob: append(good[:len(good):len(good)], good[:20]...), want: blockdev.ErrCorrupt},
		{name: "digest", mediaType: gzipType, blob: good, want: blockdev.ErrCorrupt, text: "digest",
			change: func(l *Layer) { l.Digest[0] ^= 1 }},
		{name: "DiffID", mediaType: gzipType, blob: good, want: blockdev.ErrCorrupt, text: "DiffID",
			change: func(l *Layer) { l.DiffID[0] ^= 1 }},
		{name: "longer", mediaType: gzipType, blob: good, want: blockdev.ErrCorrupt, text: "more than",
			change: func(l *Layer) { l.Size -= 10 }},
		{name: "shorter", mediaType: gzipType, blob: good, want: blockdev.ErrUnavailable, text: "early",
			change: func(l *Layer) { l.Size += 10 }},
		{name: "absent", mediaType: gzipType, blob: good, want: blockdev.ErrNotFound,
			change: func(l *Layer) { l.Open = opener(strings.TrimSuffix(l.Ref, "x"), blockdev.Digest{}) }},
		{name: "foreign", mediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", blob: good, want: blockdev.ErrUnsupported, text: "foreign",
			change: func(l *Layer) { l.Open = opener(strings.TrimSuffix(l.Ref, "x"), blockdev.Digest{}) }},
		{name: "too much", mediaType: gzipType, blob: gzipped(t, makeTar(t, 2, 3<<20)), want: blockdev.ErrUnsupported, text: "unpacks to more"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t, Config{MaxDiff: 2 << 20})
			l := f.reg.add(c.blob, diff, c.mediaType)
			l.Ref = f.reg.URL // for those who want another path there
			open := l.Open
			if c.change != nil {
				c.change(&l)
			}
			if c.name == "shorter" {
				l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
					return open(ctx, min(off, int64(len(c.blob))-1))
				}
			}
			_, err := f.in.Layer(t.Context(), l, nil)
			if c.name == "shorter" {
				// Its last byte comes again and again until the size is reached.
				c.want, c.text = blockdev.ErrCorrupt, "digest"
			}
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), l.Digest.String()) {
				t.Fatalf("error %v, want %v with %q", err, c.want, c.text)
			}
			checkAbsent(t, f.st, l)
			if !errors.Is(c.want, blockdev.ErrNotFound) && len(f.spoolFiles(t)) > 0 {
				t.Error("the spool keeps what is wrong")
			}
		})
	}
}

// newBigWindow is the start of a zstd frame with a window of 256 MiB.
func newBigWindow() []byte {
	return append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 18 << 3, 0x01, 0x00, 0x00}, make([]byte, 64)...)
}

// The body is cut after every n-th byte; the rest is asked for, nothing twice.
func TestCutBodies(t *testing.T) {
	diff := makeTar(t, 1, 1<<20)
	blob := gzipped(t, diff)
	for _, n := range []int{len(blob) / 300, len(blob) / 7, len(blob) / 2, len(blob) - 1} {
		for _, noRange := range []bool{false, true} {
			if noRange && n < len(blob)-1 {
				continue // such a registry never gets further than n
			}
			t.Run(fmt.Sprintf("%d bytes, no range %v", n, noRange), func(t *testing.T) {
				f := newFixture(t, Config{})
				l := f.reg.add(blob, diff, gzipType)
				cut := 0
				f.reg.fault = func(_ http.ResponseWriter, _ *http.Request, body []byte) (bool, int) {
					if cut++; noRange && cut > 1 {
						return false, len(body)
					}
					return false, n
				}
				f.reg.noRange.Store(noRange)
				if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
					t.Fatal(err)
				}
				checkStored(t, f.st, l, diff)
				if sent := f.reg.sent.Load(); !noRange && sent > l.Size {
					t.Errorf("%d bytes sent for a blob of %d", sent, l.Size)
				}
				if s := f.in.Stats(); s.Retries == 0 || s.Fetched != l.Size {
					t.Errorf("stats %+v", s)
				}
			})
		}
	}
}

// A blob that ends before its size is not asked for again and again: once from the
// seam on, and once as a whole.
func TestBlobEndsEarly(t *testing.T) {
	diff := makeTar(t, 1, 1<<20)
	f := newFixture(t, Config{})
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	end, open, opened := l.Size, l.Open, 0
	l.Size += 10
	l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
		if opened++; off >= end {
			return nil, fmt.Errorf("there is nothing at %d: %w", off, blockdev.ErrCorrupt)
		}
		return open(ctx, off)
	}
	if _, err := f.in.Layer(t.Context(), l, nil); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Fatalf("error %v, want %v", err, blockdev.ErrCorrupt)
	}
	if opened > 4 {
		t.Errorf("asked for %d times", opened)
	}
	checkAbsent(t, f.st, l)
}

func TestRefusalsThatPass(t *testing.T) {
	diff := makeTar(t, 1, 1<<20)
	f := newFixture(t, Config{Retries: 3})
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	n := 0
	statuses := []int{500, 429, 503, 0, 502}
	f.reg.fault = func(w http.ResponseWriter, _ *http.Request, body []byte) (bool, int) {
		n++
		if n <= len(statuses) && statuses[n-1] != 0 {
			w.WriteHeader(statuses[n-1])
			return true, 0
		}
		return false, (len(body) + 1) / 2
	}
	if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
		t.Fatal(err)
	}
	checkStored(t, f.st, l, diff)
}

func TestRefusalsThatStay(t *testing.T) {
	diff := makeTar(t, 1, 1<<20)
	for status, want := range map[int]struct {
		err error
		n   int64
	}{
		500: {blockdev.ErrUnavailable, 4}, 401: {blockdev.ErrUnauthorized, 1}, 404: {blockdev.ErrNotFound, 1},
	} {
		f := newFixture(t, Config{Retries: 3})
		l := f.reg.add(gzipped(t, diff), diff, gzipType)
		f.reg.fault = func(w http.ResponseWriter, _ *http.Request, _ []byte) (bool, int) {
			w.WriteHeader(status)
			return true, 0
		}
		if _, err := f.in.Layer(t.Context(), l, nil); !errors.Is(err, want.err) {
			t.Errorf("%d: %v", status, err)
		}
		if got := f.reg.requests.Load(); got != want.n {
			t.Errorf("%d: %d requests, want %d", status, got, want.n)
		}
		checkAbsent(t, f.st, l)
	}
}

// TestNextCredential: what a registry refuses one caller, or tells it to come back for,
// says nothing about another.
func TestNextCredential(t *testing.T) {
	for name, refusal := range map[string]statusError{
		"refused":             {status: http.StatusUnauthorized},
		"not there":           {status: http.StatusNotFound},
		"limited":             {status: http.StatusTooManyRequests},
		"limited for an hour": {status: http.StatusTooManyRequests, after: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			diff := makeTar(t, 1, 100<<10)
			f := newFixture(t, Config{})
			good := f.reg.add(gzipped(t, diff), diff, gzipType)
			good.Shows = "a credential"
			bad := good
			bad.Shows = ""
			asked, joined := make(chan struct{}), make(chan struct{})
			bad.Open = func(context.Context, int64) (io.ReadCloser, error) {
				close(asked) // once
				<-joined
				return nil, refusal
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := f.in.Layer(t.Context(), bad, nil); err != nil {
					t.Error(err)
				}
			})
			<-asked
			wg.Go(func() {
				join := sync.OnceFunc(func() { close(joined) })
				if _, err := f.in.Layer(t.Context(), good, func(Progress) { join() }); err != nil {
					t.Error(err)
				}
			})
			wg.Wait()
			checkStored(t, f.st, good, diff)
		})
	}
}

// TestLimitedCallers: callers that show the same are asked for once; a caller that comes
// with something else while the registry is left alone does not wait; of those that all are to
// come back later, the shortest time counts. Time is the test's.
func TestLimitedCallers(t *testing.T) {
	diff := makeTar(t, 1, 100<<10)
	blob := gzipped(t, diff)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		st, err := store.Open(store.Config{Dir: filepath.Join(dir, "store")})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		in, err := New(Config{Store: st, SpoolDir: filepath.Join(dir, "spool")})
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		start := time.Now()
		since := func() time.Duration { return time.Since(start).Round(time.Second) }
		var mu sync.Mutex
		asked := map[string][]time.Duration{}
		var wg sync.WaitGroup
		ask := func(shows string, answer error) {
			l := Layer{Ref: "x/y:z", Digest: blockdev.Sum(blob), Size: int64(len(blob)), MediaType: gzipType, DiffID: blockdev.Sum(diff), Origin: "x", Shows: shows}
			l.Open = func(_ context.Context, off int64) (io.ReadCloser, error) {
				mu.Lock()
				defer mu.Unlock()
				asked[shows] = append(asked[shows], since())
				if answer != nil {
					return nil, answer
				}
				return io.NopCloser(bytes.NewReader(blob[off:])), nil
			}
			wg.Go(func() {
				if _, err := in.Layer(t.Context(), l, nil); err != nil {
					t.Errorf("%q: %v", shows, err)
				}
			})
			synctest.Wait()
		}
		for range 3 * maxOpens {
			ask("", statusError{http.StatusTooManyRequests, 90 * time.Second})
		}
		time.Sleep(30 * time.Second)
		ask("a", statusError{http.StatusTooManyRequests, time.Hour})
		ask("b", statusError{http.StatusUnauthorized, 0})
		time.Sleep(30 * time.Second)
		ask("c", nil)
		wg.Wait()
		s := time.Second
		want := map[string][]time.Duration{"": {0, 30 * s, 30 * s, 60 * s}, "a": {30 * s, 30 * s, 60 * s}, "b": {30 * s, 60 * s}, "c": {60 * s}}
		if !reflect.DeepEqual(asked, want) {
			t.Errorf("asked %v, want %v", asked, want)
		}
	})
}

func TestOneFlight(t *testing.T) {
	diff := makeTar(t, 1, 2<<20)
	f := newFixture(t, Config{})
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	lied := l
	lied.DiffID[3] ^= 1
	gate := make(chan struct{})
	open := l.Open
	l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
		<-gate
		return open(ctx, off)
	}
	lied.Open = l.Open
	var wg, joined sync.WaitGroup
	for i := range 50 {
		joined.Add(1)
		wg.Go(func() {
			ask := l
			if i%10 == 0 { // some images lie about the layer; the caller tells them, or not
				ask = lied
			}
			first := sync.OnceFunc(joined.Done)
			rec, err := f.in.Layer(t.Context(), ask, func(Progress) { first() })
			if err != nil || rec.DiffID != l.DiffID {
				t.Errorf("ask %d: %v, %v", i, rec, err)
			}
		})
	}
	joined.Wait()
	close(gate)
	wg.Wait()
	if n := f.reg.requests.Load(); n != 1 {
		t.Errorf("%d requests for 50 asks", n)
	}
	checkStored(t, f.st, l, diff)
}

// Who leaves does not end the flight for the others; when all have left, it ends
// after the grace period, and the next one goes on where it was.
func TestLeaving(t *testing.T) {
	diff := makeTar(t, 1, 2<<20)
	f := newFixture(t, Config{Grace: time.Nanosecond})
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	half := int(l.Size) / 2
	var hang sync.WaitGroup
	hang.Add(1)
	f.reg.fault = func(w http.ResponseWriter, r *http.Request, body []byte) (bool, int) {
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		_, _ = w.Write(body[:half]) // the client goes
		w.(http.Flusher).Flush()
		<-r.Context().Done() // the client has gone
		hang.Done()
		panic(http.ErrAbortHandler)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := f.in.Layer(ctx, l, func(p Progress) {
		if p.Fetched > 0 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	hang.Wait() // only the end of the flight closes the connection
	f.reg.mu.Lock()
	f.reg.fault = nil
	f.reg.mu.Unlock()
	before := f.reg.sent.Load()
	if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
		t.Fatal(err)
	}
	if sent := f.reg.sent.Load() - before; sent >= l.Size {
		t.Errorf("%d bytes sent again", sent)
	}
	if f.in.Stats().Resumed == 0 {
		t.Error("nothing resumed")
	}
	checkStored(t, f.st, l, diff)
}

// Garbage at the end of a spool file, as after a power failure.
func TestDamagedSpool(t *testing.T) {
	diff := makeTar(t, 1, 2<<20)
	f := newFixture(t, Config{})
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	name := filepath.Join(f.dir, "spool", spoolName(flightKey{l.Digest, l.Size, l.Host}))
	if err := os.WriteFile(name, make([]byte, l.Size/2), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
		t.Fatal(err)
	}
	if f.in.Stats().Resumed == 0 {
		t.Error("the file was not looked at")
	}
	checkStored(t, f.st, l, diff)
}

// A registry that answers range requests with wrong bytes.
func TestWrongRange(t *testing.T) {
	diff := makeTar(t, 1, 2<<20)
	f := newFixture(t, Config{})
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	open, n := l.Open, 0
	l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
		if n++; n == 1 {
			rc, err := open(ctx, 0)
			return struct {
				io.Reader
				io.Closer
			}{io.LimitReader(rc, l.Size/2), rc}, err
		}
		if off > 0 {
			return io.NopCloser(io.LimitReader(zeroReader{}, l.Size-off)), nil
		}
		return open(ctx, off)
	}
	if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
		t.Fatal(err)
	}
	checkStored(t, f.st, l, diff)
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A connection that brings nothing counts as broken, and pauses are those that
// the registry asks for. Time is the test's.
func TestStallAndRetryAfter(t *testing.T) {
	diff := makeTar(t, 1, 200<<10)
	blob := gzipped(t, diff)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		st, err := store.Open(store.Config{Dir: filepath.Join(dir, "store")})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		in, err := New(Config{Store: st, SpoolDir: filepath.Join(dir, "spool"), Stall: 20 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		n := 0
		l := Layer{Ref: "x/y:z", Digest: blockdev.Sum(blob), Size: int64(len(blob)), MediaType: gzipType, DiffID: blockdev.Sum(diff), Origin: "x"}
		l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
			switch n++; n {
			case 1: // half, and then nothing
				pr, pw := io.Pipe()
				go func() {
					_, err := pw.Write(blob[:len(blob)/2])
					<-ctx.Done()
					pw.CloseWithError(err)
				}()
				return pr, nil
			case 2:
				return nil, statusError{http.StatusTooManyRequests, 70 * time.Second}
			default:
				return io.NopCloser(strings.NewReader(string(blob[off:]))), nil
			}
		}
		start := time.Now()
		if _, err := in.Layer(t.Context(), l, nil); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start).Round(time.Second); d != 90*time.Second || n != 3 {
			t.Errorf("%d connections in %v, want 3 in 20 s + 70 s", n, d)
		}
		l.Digest[0] ^= 1
		l.Open = func(context.Context, int64) (io.ReadCloser, error) {
			return nil, statusError{http.StatusTooManyRequests, time.Hour}
		}
		if _, err := in.Layer(t.Context(), l, nil); !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), "1h0m0s") {
			t.Errorf("asked to come back in an hour: %v", err)
		}
	})
}

func TestSpoolQuota(t *testing.T) {
	diff := makeTar(t, 1, 2<<20)
	blob := gzipped(t, diff)
	f := newFixture(t, Config{SpoolQuota: int64(len(blob)) + 1000, SpoolExpiry: time.Hour})
	l := f.reg.add(blob, diff, gzipType)
	small := gzipped(t, makeTar(t, 2, 300<<10))
	// Others' leftovers make room, the oldest first.
	var names []string
	for i := range 3 {
		name := filepath.Join(f.dir, "spool", fmt.Sprint("leftover", i))
		names = append(names, name)
		if err := os.WriteFile(name, small[:400], 0o600); err != nil {
			t.Fatal(err)
		}
		at := time.Now().Add(-time.Duration(i+1) * time.Minute)
		if err := os.Chtimes(name, at, at); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
		t.Fatal(err)
	}
	left := f.spoolFiles(t)
	if len(left) != 2 || left[0] != names[0] || left[1] != names[1] {
		t.Errorf("left in the spool: %v", left)
	}
	// Too large for it altogether.
	diff = makeTar(t, 3, 4<<20)
	big := f.reg.add(gzipped(t, diff), diff, gzipType)
	if _, err := f.in.Layer(t.Context(), big, nil); !errors.Is(err, blockdev.ErrNoSpace) || !strings.Contains(err.Error(), "store.spool_quota") {
		t.Errorf("larger than the quota: %v", err)
	}
	// Two that fit one at a time only.
	var wg sync.WaitGroup
	for seed := range uint64(3) {
		diff := makeTar(t, seed+10, 2<<20)
		l := f.reg.add(gzipped(t, diff), diff, gzipType)
		wg.Go(func() {
			if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	// Expired ones go.
	at := time.Now().Add(-2 * time.Hour)
	name := filepath.Join(f.dir, "spool", "old")
	if err := errors.Join(os.WriteFile(name, small, 0o600), os.Chtimes(name, at, at), f.in.spool.expire()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(name); err == nil {
		t.Error("expired spool file is still there")
	}
}

// A disk that fills up under the spool, or under the store.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	for _, where := range []string{"spool", "store"} {
		t.Run(where, func(t *testing.T) {
			f := &fixture{dir: t.TempDir(), reg: newRegistry(t)}
			dir := filepath.Join(f.dir, where)
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=6m"); err != nil {
				t.Skipf("no tmpfs: %v", err)
			}
			t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
			f.open(t, Config{})
			smallDiff := makeTar(t, 1, 1<<20)
			small := f.reg.add(gzipped(t, smallDiff), smallDiff, gzipType)
			if _, err := f.in.Layer(t.Context(), small, nil); err != nil {
				t.Fatal(err)
			}
			// In use, so that it does not just make room.
			defer f.st.Pin(small.DiffID)()
			diff := makeTar(t, 2, 20<<20)
			l := f.reg.add(gzipped(t, diff), diff, gzipType)
			if _, err := f.in.Layer(t.Context(), l, nil); !errors.Is(err, blockdev.ErrNoSpace) {
				t.Fatalf("error %v, want no space", err)
			}
			if _, err := f.st.Layer(l.Digest); !errors.Is(err, blockdev.ErrNotFound) {
				t.Error("published on a full disk")
			}
			checkStored(t, f.st, small, smallDiff)
			diff = makeTar(t, 3, 1<<20)
			l = f.reg.add(gzipped(t, diff), diff, gzipType)
			if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
				t.Fatalf("the next layer, which fits: %v", err)
			}
			checkStored(t, f.st, l, diff)
		})
	}
}

func TestClose(t *testing.T) {
	diff := makeTar(t, 1, 1<<20)
	f := newFixture(t, Config{})
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	begun := make(chan struct{})
	l.Open = func(ctx context.Context, _ int64) (io.ReadCloser, error) {
		close(begun)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	errs := make(chan error)
	go func() {
		_, err := f.in.Layer(context.Background(), l, nil)
		errs <- err
	}()
	<-begun
	if err := f.in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-errs; !errors.Is(err, ErrClosed) {
		t.Errorf("waiting while closed: %v", err)
	}
	if _, err := f.in.Layer(t.Context(), l, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("asked after Close: %v", err)
	}
}
