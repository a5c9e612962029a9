package registrytest

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
)

// Odd is a way in which a registry is not as one would like it. It may answer a
// request itself (true), or leave it to the next one and, in the end, to the Fake.
type Odd func(w http.ResponseWriter, r *http.Request) bool

// Script makes a Fake behave in these ways; the first that answers counts.
func (f *Fake) Script(odd ...Odd) {
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		for _, o := range odd {
			if o(w, r) {
				return true
			}
		}
		return false
	})
}

// On applies an Odd to requests with this method ("" for all) and a path that
// contains part.
func On(method, part string, odd Odd) Odd {
	return func(w http.ResponseWriter, r *http.Request) bool {
		return (method == "" || method == r.Method) && strings.Contains(r.URL.Path, part) && odd(w, r)
	}
}

// Times applies an Odd n times.
func Times(n int32, odd Odd) Odd {
	var used atomic.Int32
	return func(w http.ResponseWriter, r *http.Request) bool {
		return used.Add(1) <= n && odd(w, r)
	}
}

// Status answers with a status and headers (name, value, ...).
func Status(status int, headers ...string) Odd {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		for i := 0; i+1 < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		Fail(w, status, "ODD")
		return true
	}
}

// RedirectTo sends requests to base with the same path. Each gets a signature of
// its own in its query.
func RedirectTo(base string) Odd {
	var n atomic.Int64
	return func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, fmt.Sprintf("%s%s?X-Amz-Signature=%d", base, r.URL.Path, n.Add(1)), http.StatusTemporaryRedirect)
		return true
	}
}

// Connect makes tunnels to this address, whatever is asked for, as a proxy does that knows
// all names.
func Connect(to string) Odd {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodConnect {
			return false
		}
		out, err := net.Dial("tcp", to)
		if err != nil {
			Fail(w, http.StatusBadGateway, "")
			return true
		}
		defer out.Close()
		w.WriteHeader(http.StatusOK)
		in, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return true // the client is gone
		}
		defer in.Close()
		go func() {
			_, _ = io.Copy(out, buffered) // until one of the two goes
			_ = out.Close()
		}()
		_, _ = io.Copy(in, out)
		return true
	}
}

// SignedOnce refuses requests whose signature has been seen, or that have none: as
// if a signed URL were good for a moment.
func SignedOnce() Odd {
	var mu sync.Mutex
	seen := map[string]bool{"": true}
	return func(w http.ResponseWriter, r *http.Request) bool {
		sig := r.URL.Query().Get("X-Amz-Signature")
		mu.Lock()
		defer mu.Unlock()
		if seen[sig] {
			Fail(w, http.StatusForbidden, "")
			return true
		}
		seen[sig] = true
		return false
	}
}

// WantReferer refuses requests that do not say where they come from.
func WantReferer(host string) Odd {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if u, err := url.Parse(r.Header.Get("Referer")); err == nil && u.Host == host {
			return false
		}
		return Status(http.StatusUnauthorized, "WWW-Authenticate", `Basic realm="storage"`)(w, r)
	}
}

// Blob serves bytes in an odd way, from where a request's Range begins.
type Blob struct {
	Data []byte
	// NoRanges: all of it is sent, whatever is asked for.
	NoRanges bool
	// Cut: the connection breaks after so many bytes of an answer. 0: never.
	Cut int
	// Length is what Content-Length says; 0: what is right, -1: nothing.
	Length int
	// Encoding is what Content-Encoding says.
	Encoding string
}

// Serve is the Odd.
func (b Blob) Serve(w http.ResponseWriter, r *http.Request) bool {
	from := 0
	if h := r.Header.Get("Range"); h != "" && !b.NoRanges {
		if _, err := fmt.Sscanf(h, "bytes=%d-", &from); err != nil || from > len(b.Data) {
			Fail(w, http.StatusRequestedRangeNotSatisfiable, "")
			return true
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(b.Data)-1, len(b.Data)))
	}
	data := b.Data[from:]
	switch b.Length {
	case 0:
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	case -1:
	default:
		w.Header().Set("Content-Length", fmt.Sprint(b.Length))
		data = data[:min(b.Length, len(data))]
	}
	if b.Encoding != "" {
		w.Header().Set("Content-Encoding", b.Encoding)
	}
	if from > 0 {
		w.WriteHeader(http.StatusPartialContent)
	}
	if r.Method == http.MethodHead {
		return true
	}
	if b.Cut > 0 && b.Cut < len(data) {
		_, _ = w.Write(data[:b.Cut]) // the client may be gone
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	if b.Length == -1 {
		_ = http.NewResponseController(w).Flush() // no length is known by now
	}
	_, _ = w.Write(data) // the client may be gone
	return true
}
