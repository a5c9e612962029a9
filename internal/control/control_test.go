package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a daemon of which a test says what it does.
type fake struct {
	status   func(context.Context) (*Status, error)
	prefetch func(context.Context, PrefetchRequest, func(Event)) error
	check    func(context.Context, CheckRequest, func(string)) (*CheckReport, error)
}

func (f fake) Status(ctx context.Context) (*Status, error) { return f.status(ctx) }

func (f fake) Check(ctx context.Context, req CheckRequest, event func(string)) (*CheckReport, error) {
	return f.check(ctx, req, event)
}

func (f fake) Prefetch(ctx context.Context, req PrefetchRequest, event func(Event)) error {
	return f.prefetch(ctx, req, event)
}

// serve runs d on a socket until the test ends, or stop is called, which returns
// what Serve returned.
func serve(t *testing.T, d Daemon) (c Client, stop func() error) {
	t.Helper()
	c.Path = filepath.Join(t.TempDir(), "run", "s.sock")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, c.Path, d) }()
	stopped := false
	stop = func() error {
		cancel()
		if stopped {
			return nil
		}
		stopped = true
		return <-ended
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	for !answers(c.Path) {
		select {
		case err := <-ended:
			t.Fatalf("serve: %v", err)
		default:
		}
	}
	return c, stop
}

func answers(path string) bool {
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// TestPrivate: at no moment may others than root open a socket, whatever the umask.
func TestPrivate(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(t.TempDir(), "s")
	stop, looked := make(chan struct{}), make(chan os.FileMode, 1)
	go func() {
		var wrong os.FileMode
		for {
			select {
			case <-stop:
				looked <- wrong
				return
			default:
			}
			if fi, err := os.Lstat(path); err == nil && fi.Mode().Perm() != 0o600 {
				wrong = fi.Mode()
			}
		}
	}()
	for range 200 {
		ln, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Fatalf("mode is %v, %v", fi.Mode(), err)
		}
		_ = ln.Close()
	}
	close(stop)
	if mode := <-looked; mode != 0 {
		t.Errorf("for a moment the socket's mode was %v", mode)
	}
}

func TestStatus(t *testing.T) {
	want := &Status{Version: "v1", Role: "node", Supernodes: []string{"embedded"}, Images: []Image{{
		Ref:    "docker.io/library/redis:7",
		Layers: []Layer{{DiffID: "sha256:aa", Size: 1 << 40, Local: 1<<40 - 1, Mount: "lazy"}, {DiffID: "sha256:bb", Size: 3}},
	}}}
	c, _ := serve(t, fake{status: func(context.Context) (*Status, error) { return want, nil }})
	got, err := c.Status(t.Context())
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	c, _ = serve(t, fake{status: func(context.Context) (*Status, error) { return nil, errors.New("metadata.db is locked") }})
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "metadata.db is locked") {
		t.Errorf("%v does not say what the daemon said", err)
	}
}

func TestPrefetch(t *testing.T) {
	sent := []Event{
		{Layer: "sha256:aa", Stage: "fetching", Done: 1, Total: 10},
		{Layer: "sha256:aa", Stage: "fetching", Done: 10, Total: 10},
		{Layer: "sha256:bb", Stage: "verified"},
	}
	seen := make(chan struct{}) // an event is there before the request ends
	var asked PrefetchRequest
	c, _ := serve(t, fake{prefetch: func(_ context.Context, req PrefetchRequest, event func(Event)) error {
		asked = req
		for i, e := range sent {
			event(e)
			if i == 0 {
				<-seen
			}
		}
		if req.Ref == "bad" {
			return fmt.Errorf("layer sha256:bb: %w", errors.New("the registry is down"))
		}
		return nil
	}})
	var got []Event
	req := PrefetchRequest{Ref: "redis", Local: true}
	err := c.Prefetch(t.Context(), req, func(e Event) {
		if got = append(got, e); len(got) == 1 {
			close(seen)
		}
	})
	if err != nil || !reflect.DeepEqual(got, sent) || asked != req {
		t.Errorf("request %+v, events %+v, %v; want %+v, %+v", asked, got, err, req, sent)
	}
	got = nil
	err = c.Prefetch(t.Context(), PrefetchRequest{Ref: "bad"}, func(e Event) { got = append(got, e) })
	if err == nil || err.Error() != "layer sha256:bb: the registry is down" || len(got) != len(sent) {
		t.Errorf("error %v after %d events", err, len(got))
	}
}

// TestCancel: a client that goes away ends the daemon's work for it.
func TestCancel(t *testing.T) {
	began, ended := make(chan struct{}), make(chan error, 1)
	c, _ := serve(t, fake{prefetch: func(ctx context.Context, _ PrefetchRequest, event func(Event)) error {
		event(Event{Layer: "x", Stage: "fetching"})
		close(began)
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-began
		cancel()
	}()
	if err := c.Prefetch(ctx, PrefetchRequest{Ref: "x"}, func(Event) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("the client got %v", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the daemon got %v", err)
	}
}

// TestStop: a daemon that ends cancels its requests and waits for them; the
// client does not take that for success.
func TestStop(t *testing.T) {
	began, ended := make(chan struct{}), false
	c, stop := serve(t, fake{prefetch: func(ctx context.Context, _ PrefetchRequest, event func(Event)) error {
		event(Event{Layer: "x", Stage: "fetching"})
		close(began)
		<-ctx.Done()
		ended = true
		return ctx.Err()
	}})
	result := make(chan error, 1)
	go func() { result <- c.Prefetch(t.Context(), PrefetchRequest{Ref: "x"}, func(Event) {}) }()
	<-began
	if err := stop(); err != nil {
		t.Errorf("serve: %v", err)
	}
	if !ended {
		t.Error("Serve has returned, and the request goes on")
	}
	if err := <-result; err == nil {
		t.Error("the client took the end of the daemon for success")
	}
	if _, err := os.Lstat(c.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// TestNoSuccess: only what ends with the last event has succeeded.
func TestNoSuccess(t *testing.T) {
	for name, body := range map[string]string{
		"nothing":     "",
		"no end":      `{"layer":"x"}` + "\n",
		"half an end": `{"finished":tr`,
		"no JSON":     "done\n",
		"long line":   strings.Repeat("x", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			ln, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				buf := make([]byte, 4096)
				if _, err := conn.Read(buf); err == nil {
					_, _ = conn.Write([]byte("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)) // the client may stop reading
				}
			}()
			if err := (Client{Path: path}).Prefetch(t.Context(), PrefetchRequest{Ref: "x"}, func(Event) {}); err == nil {
				t.Error("no error")
			}
			_ = ln.Close()
			<-done
		})
	}
}

func TestNoDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.sock")
	_, err := Client{Path: path}.Status(t.Context())
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "is `shoal node`") {
		t.Errorf("%v does not say where it looked and what to do", err)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new", "s.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; only root may open the socket", fi.Mode(), err)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another shoal") {
		t.Errorf("a second one on a living socket: %v", err)
	}
	if !answers(path) {
		t.Error("the first does not answer any more")
	}
	// As a daemon leaves it that was killed.
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := net.Dial("unix", path); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("no dead socket to try with: %v", err)
	}
	if ln, err = Listen(path); err != nil {
		t.Fatalf("in place of a dead one: %v", err)
	}
	_ = ln.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("in place of a file: %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
	if err := Serve(t.Context(), file, fake{}); err == nil {
		t.Error("Serve took the place of a file")
	}
}
