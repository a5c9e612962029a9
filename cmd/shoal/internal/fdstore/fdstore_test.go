package fdstore

import (
	"context"
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The other side is tested with package keep, which is one.

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestNobody(t *testing.T) {
	for name, env := range map[string][2]string{
		"no socket":                 {"", ""},
		"a manager without a store": {"@nobody", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NOTIFY_SOCKET", env[0])
			t.Setenv("FDSTORE", env[1])
			if env[1] == "" {
				_ = os.Unsetenv("FDSTORE") // t.Setenv puts it back
			}
			s := open(t)
			if s.Kept() {
				t.Error("somebody keeps descriptors")
			}
			if err := s.Keep("x", os.Stdin); !errors.Is(err, ErrNoStore) {
				t.Errorf("keep: %v", err)
			}
			if err := s.Drop("x"); err != nil {
				t.Error(err)
			}
			if s.Take("x") != nil {
				t.Error("something was kept")
			}
			if err := s.Watch(t.Context(), nil); err != nil {
				t.Errorf("watch: %v", err)
			}
		})
	}
}

// standby is Open in a process that keep has started as a standby: it returns keep's end
// of the socket after Open has said that it waits.
func standby(t *testing.T, ctx context.Context) (turn *os.File, opened func() (*Store, error)) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
	if err != nil {
		t.Fatal(err)
	}
	turn = os.NewFile(uintptr(fds[0]), "turn")
	t.Cleanup(func() { turn.Close() })
	t.Setenv(StandbyEnv, strconv.Itoa(fds[1]))
	var store *Store
	done := make(chan error, 1)
	go func() {
		var err error
		store, err = Open(ctx)
		done <- err
	}()
	if n, err := turn.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Fatalf("the standby does not say that it waits: %d bytes, %v", n, err)
	}
	return turn, func() (*Store, error) {
		err := <-done
		if os.Getenv(StandbyEnv) != "" {
			t.Error("its children would wait, too")
		}
		return store, err
	}
}

// TestTurn: a standby gets what is stored when it is its turn, blocking and for itself.
func TestTurn(t *testing.T) {
	for _, n := range []int{0, 1, 64} {
		turn, opened := standby(t, t.Context())
		var names []string
		var files []*os.File
		for i := range n {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			f := os.NewFile(uintptr(fds[0]), "x")
			defer f.Close()
			_, err = unix.Write(fds[1], []byte{byte(i)})
			if err := errors.Join(err, unix.Close(fds[1])); err != nil {
				t.Fatal(err)
			}
			names, files = append(names, "name of "+strconv.Itoa(i)), append(files, f)
		}
		if err := GoOn(turn, names, files); err != nil {
			t.Fatal(err)
		}
		s, err := opened()
		if err != nil {
			t.Fatal(err)
		}
		if len(s.files) != n {
			t.Errorf("%d of %d files came", len(s.files), n)
		}
		for i, name := range names {
			f := s.Take(name)
			if f == nil {
				t.Fatalf("%q did not come", name)
			}
			b := []byte{255}
			if _, err := f.Read(b); err != nil || int(b[0]) != i {
				t.Errorf("%q is file %d (%v)", name, b[0], err)
			}
			if nonblocking, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil || nonblocking&unix.O_NONBLOCK != 0 {
				t.Errorf("flags %x, %v", nonblocking, err)
			}
			if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Error("children inherit it", err)
			}
			f.Close()
		}
	}
}

// TestNoTurn: the end of the other side, of the context, or a message without the
// descriptors that it names, ends the wait with an error.
func TestNoTurn(t *testing.T) {
	for name, end := range map[string]func(turn *os.File, cancel func()){
		"other side": func(turn *os.File, _ func()) { turn.Close() },
		"context":    func(_ *os.File, cancel func()) { cancel() },
		"names":      func(turn *os.File, _ func()) { _ = GoOn(turn, []string{"a", "b"}, []*os.File{os.Stdin}) },
		"stranger":   func(turn *os.File, _ func()) { _, _ = turn.Write([]byte{1}) },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			turn, opened := standby(t, ctx)
			end(turn, cancel)
			if _, err := opened(); err == nil {
				t.Error("no error")
			} else {
				t.Log(err)
			}
		})
	}
	t.Setenv(StandbyEnv, "x")
	if _, err := Open(t.Context()); err == nil {
		t.Error("a descriptor that is not a number")
	}
}

// TestTurnOfTheDead: a standby that has ended does not get its turn.
func TestTurnOfTheDead(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	turn, opened := standby(t, ctx)
	cancel()
	if _, err := opened(); err == nil {
		t.Error("no error")
	}
	if err := GoOn(turn, nil, nil); !errors.Is(err, unix.EPIPE) {
		t.Errorf("%v, want %v", err, unix.EPIPE)
	}
}

// TestPoll: systemd polls listeners, which it drops if they do not listen any more, and
// nothing else: it would wake for each request of a /dev/fuse.
func TestPoll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	other, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("FDSTORE", "16")
	messages := make(chan string, 16)
	go func() {
		defer close(messages)
		text, rights := make([]byte, 1<<10), make([]byte, 1<<10)
		for {
			n, nr, _, _, err := other.ReadMsgUnix(text, rights)
			if err != nil {
				return
			}
			control, _ := unix.ParseSocketControlMessage(rights[:nr])
			for _, m := range control {
				fds, _ := unix.ParseUnixRights(&m)
				for _, fd := range fds {
					_ = unix.Close(fd) // for the barrier this is the answer
				}
			}
			messages <- string(text[:n])
		}
	}()
	s, err := Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	device, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	listener, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := errors.Join(s.Keep("device", device), s.Keep("listener", listener)); err != nil {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	polled := map[string]bool{}
	for m := range messages {
		if lines := strings.Split(m, "\n"); slices.Contains(lines, "FDSTORE=1") {
			polled[lines[slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "FDNAME=") })]] = !slices.Contains(lines, "FDPOLL=0")
		}
	}
	if want := map[string]bool{"FDNAME=device": false, "FDNAME=listener": true}; !maps.Equal(polled, want) {
		t.Errorf("polled: %v, want %v", polled, want)
	}
}

// TestDeaf: a socket that nobody reads is an error, and no hang.
func TestDeaf(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "@shoal-fdstore-test-nobody-is-here")
	s := open(t)
	if err := s.Keep("x", os.Stdin); err == nil {
		t.Error("kept by nobody")
	}
}
