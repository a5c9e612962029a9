// Package control is how `shoal status`, `prefetch` and `check` talk to a running
// daemon: JSON over HTTP on a Unix socket that only root may open. Prefetch
// answers with one JSON event a line, so progress is seen as it happens, and
// closing the connection cancels it.
package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/shoalfs/shoal/internal/image"
)

// Status is what `shoal status` shows. Sizes are bytes.
type Status struct {
	Version string `json:"version"`
	// Role is node or supernode.
	Role string `json:"role"`
	// Supernodes are the addresses a node asks; "embedded" if it asks itself.
	Supernodes []string `json:"supernodes,omitempty"`
	// NoSupernode and Called are State's.
	NoSupernode string    `json:"no_supernode,omitempty"`
	Called      time.Time `json:"called,omitzero"`
	Images      []Image   `json:"images"`
	// NotLazy, on a node, are images that were not lazy when they were pulled, the
	// newest pull last.
	NotLazy []NotLazy `json:"not_lazy,omitempty"`
}

// NotLazy says why containerd unpacks an image.
type NotLazy struct {
	Ref string `json:"ref"` // empty: containerd has not said which image it is
	// Cause is the class that the metric counts, and Why the whole of it.
	Cause string    `json:"cause"`
	Why   string    `json:"why"`
	At    time.Time `json:"at"`
}

// Image is one image on a node, or one that a supernode has stored.
type Image struct {
	Ref string `json:"ref"`
	// Size and Local are sums over Layers. Complete: every byte is
	// there.
	Size     int64   `json:"size"`
	Local    int64   `json:"local"`
	Complete bool    `json:"complete"`
	Layers   []Layer `json:"layers"`
}

// Sum sets what is a sum over the layers.
func (im *Image) Sum() {
	im.Size, im.Local, im.Complete = 0, 0, true
	for _, l := range im.Layers {
		im.Size += l.Size
		im.Local += l.Local
		im.Complete = im.Complete && l.Local == l.Size
	}
}

// Layer is one layer of an Image.
type Layer struct {
	DiffID string `json:"diff_id"`
	Size   int64  `json:"size"`
	Local  int64  `json:"local"`
	// Mount is native, lazy, or empty where the layer is not mounted.
	Mount string `json:"mount,omitempty"`
	// LazyUsers is how many containers read the layer through FUSE, and so depend on the
	// daemon. With a native mount these are such as began before the layer was complete.
	LazyUsers int `json:"lazy_users,omitempty"`
	// Proof, on a node, is proven (all bytes were here, and they are what the
	// image config says), quarantined (they are not), or empty until it is known.
	Proof string `json:"proof,omitempty"`
}

// PrefetchRequest names one image and says how far it is to be brought.
type PrefetchRequest struct {
	Ref string `json:"ref"`
	// Local: to this node's disk, every byte verified, and every layer proven.
	// Otherwise: to the supernode.
	Local bool `json:"local"`
	// Credential, unless it is zero, opens the image instead of the daemon's own.
	Credential image.Credential `json:"credential,omitzero"`
}

// Event reports the progress of one layer, or how the request ended.
type Event struct {
	Layer string `json:"layer,omitempty"`
	Stage string `json:"stage,omitempty"`
	// Done and Total are bytes; Total is 0 while it is not known.
	Done  int64 `json:"done,omitempty"`
	Total int64 `json:"total,omitempty"`
	// Finished is set in the last event; Error says why the request failed.
	Finished bool   `json:"finished,omitempty"`
	Error    string `json:"error,omitempty"`
}

// LayerEvents makes a layer's progress an Event.
func LayerEvents(event func(Event)) func(image.Progress) {
	return func(p image.Progress) {
		event(Event{Layer: p.Layer.String(), Stage: string(p.Stage), Done: p.Done, Total: p.Total})
	}
}

// Daemon is what the socket gives access to.
type Daemon interface {
	Status(ctx context.Context) (*Status, error)
	// Prefetch reports by calling event, from one goroutine at a time, and
	// returns nil when every byte is where the request wants it, verified.
	Prefetch(ctx context.Context, req PrefetchRequest, event func(Event)) error
	// Check checks all that the daemon keeps on disk, and disturbs no reader. It calls
	// event with what it is about to look at, from one goroutine.
	Check(ctx context.Context, req CheckRequest, event func(what string)) (*CheckReport, error)
}

// Serve answers on a new Unix socket at path until ctx ends. A socket that a
// dead daemon left is replaced; one that a living daemon serves is an error.
func Serve(ctx context.Context, path string, d Daemon) error {
	ln, err := Listen(path)
	if err != nil {
		return err
	}
	return ServeOn(ctx, ln, d)
}

// ServeOn answers on a socket, which it closes, until ctx ends.
func ServeOn(ctx context.Context, ln net.Listener, d Daemon) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		st, err := d.Status(r.Context())
		answer(w, st, err, http.StatusInternalServerError)
	})
	mux.HandleFunc("POST /v1/prefetch", stream(func(ctx context.Context, req PrefetchRequest, send func(Event)) Event {
		last := Event{Finished: true}
		if err := d.Prefetch(ctx, req, send); err != nil {
			last.Error = err.Error()
		}
		return last
	}))
	mux.HandleFunc("POST /v1/check", stream(func(ctx context.Context, req CheckRequest, send func(checkEvent)) checkEvent {
		report, err := d.Check(ctx, req, func(what string) { send(checkEvent{What: what}) })
		if err != nil {
			return checkEvent{Error: err.Error()}
		}
		return checkEvent{Report: report}
	}))
	serveMembers(mux, d)
	serveReload(mux, d)
	serveStore(mux, d)
	serveState(mux, d)
	// Profiles of a running daemon, for root alone as everything here.
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		// The requests end with ctx. The caller of Serve may close what d uses.
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		_ = srv.Shutdown(wait) // what is still there then is cut off
		_ = srv.Close()
	})
	err := srv.Serve(ln)
	if !stop() {
		<-stopped
	}
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control socket %s: %w", ln.Addr(), err)
	}
	return nil
}

// answer writes v as JSON, or the error with its status.
func answer(w http.ResponseWriter, v any, err error, status int) {
	if err != nil {
		http.Error(w, err.Error(), status)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // a client that went away needs no answer
}

// maxRequest bounds a request, in bytes.
const maxRequest = 64 << 10

// change answers a request that changes something, and maybe a registry is asked.
func change[Req, Resp any](do func(context.Context, Req) (Resp, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var req Req
		var resp Resp
		err := json.NewDecoder(io.LimitReader(r.Body, maxRequest)).Decode(&req)
		if err == nil {
			resp, err = do(r.Context(), req)
		}
		answer(w, resp, err, http.StatusBadRequest)
	}
}

// stream answers with an event a line as the work goes on, and what do returns as the last.
func stream[Req, Event any](do func(ctx context.Context, req Req, send func(Event)) Event) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var req Req
		if err := json.NewDecoder(io.LimitReader(r.Body, maxRequest)).Decode(&req); err != nil {
			http.Error(w, "request: "+err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/x-ndjson")
		send := func(e Event) {
			_ = json.NewEncoder(w).Encode(e) // r.Context ends when the client goes away
			_ = http.NewResponseController(w).Flush()
		}
		send(do(r.Context(), req, send))
	}
}

// stopTimeout is how long Serve waits for requests that were cancelled.
const stopTimeout = 5 * time.Second

// Listen makes a Unix socket at path that only root may open, with its
// directory.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("socket %s is served already: is another shoal running? Stop it, or set another address in the config of this one", path)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		// Connecting to what is no socket is refused as well.
		if fi, err := os.Lstat(path); err != nil || fi.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("socket %s: a file that is not a socket is there: move the file away, or choose another path in the config", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("socket %s: %w", path, err)
		}
	}
	// bind(2) gives the file the mode that the socket has, so there is no moment at
	// which others could open it.
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) }), err)
	}}
	ln, err := private.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return ln, nil
}

// ErrSilent: a daemon holds the socket and does not answer.
var ErrSilent = errors.New("the daemon does not answer")

const (
	// connectTimeout is how long it may take to get a connection: a daemon that hangs
	// accepts none, once some wait.
	connectTimeout = 5 * time.Second
	// answerTimeout is how long an answer may take that needs no work.
	answerTimeout = 10 * time.Second
)

// maxAnswer bounds an answer, or one event of it, in bytes: a report of a check is one.
const maxAnswer = 64 << 20

// quickly makes a request that is answered at once, or never.
func quickly[T any](ctx context.Context, c Client, method, path string, req any) (T, error) {
	err := fmt.Errorf("%w within %v at %s: the daemon hangs, or the machine is very busy; look at the daemon's log, and restart the daemon if this lasts", ErrSilent, answerTimeout, c.Path)
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, err)
	defer cancel()
	v, aerr := ask[T](ctx, c, method, path, req)
	if aerr != nil && context.Cause(ctx) == err { //nolint:errorlint // this very one
		return v, err
	}
	return v, aerr
}

// ask makes a request and reads the answer; req may be nil.
func ask[T any](ctx context.Context, c Client, method, path string, req any) (v T, err error) {
	resp, err := c.do(ctx, method, path, req)
	if err != nil {
		return v, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&v); err != nil {
		return v, fmt.Errorf("daemon's answer: %w", err)
	}
	return v, nil
}

// events makes a request that stream answers, and calls event with each event until it says
// that this one is the last. what says what has not happened if the last one is missing.
func events[Event any](ctx context.Context, c Client, path string, req any, what string, event func(Event) (last bool)) error {
	resp, err := c.do(ctx, http.MethodPost, path, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxAnswer)
	for lines.Scan() {
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("daemon's answer: %w", err)
		}
		if event(e) {
			return nil
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the daemon ended before %s (%w): see its log", what, errors.Join(io.ErrUnexpectedEOF, lines.Err()))
}

// ErrNoDaemon: no process serves the socket.
var ErrNoDaemon = errors.New("no shoal daemon answers")

// Client talks to the daemon whose socket is at Path.
type Client struct {
	Path string
}

func (c Client) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	encoded, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	tr := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			d := net.Dialer{Timeout: connectTimeout}
			return d.DialContext(ctx, "unix", c.Path)
		},
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://shoal"+path, bytes.NewReader(encoded))
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
			return nil, fmt.Errorf("%w: it has accepted no connection within %v at %s; look at the daemon's log, and restart the daemon if this lasts", ErrSilent, connectTimeout, c.Path)
		}
		return nil, fmt.Errorf("%w at %s (%w): is `shoal node` or `shoal supernode` running, and are you root? --control names another socket", ErrNoDaemon, c.Path, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		msg, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return nil, fmt.Errorf("daemon: %s", bytes.TrimSpace(msg))
	}
	return resp, nil
}

// Status asks for the daemon's Status.
func (c Client) Status(ctx context.Context) (*Status, error) {
	return quickly[*Status](ctx, c, http.MethodGet, "/v1/status", nil)
}

// Prefetch has the daemon do req, and reports as it goes. It returns nil only
// when the daemon said that all of it is done.
func (c Client) Prefetch(ctx context.Context, req PrefetchRequest, event func(Event)) error {
	var failed error
	err := events(ctx, c, "/v1/prefetch", req, "the image was complete", func(e Event) bool {
		switch {
		case !e.Finished:
			event(e)
		case e.Error != "":
			failed = errors.New(e.Error)
		}
		return e.Finished
	})
	return errors.Join(err, failed)
}
