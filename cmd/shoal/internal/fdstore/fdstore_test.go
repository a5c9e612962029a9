package fdstore

import (
	"context"
	"errors"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// The other side is tested with package keep, which is one.

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
			s := Open()
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

// TestAwait: the end of the other side, or of the context, ends the wait with an error.
func TestAwait(t *testing.T) {
	if err := Await(t.Context()); err != nil {
		t.Errorf("a process that is started when it is its turn: %v", err)
	}
	for name, end := range map[string]func(other *os.File, cancel func()){
		"other side": func(other *os.File, _ func()) { other.Close() },
		"context":    func(_ *os.File, cancel func()) { cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				t.Fatal(err)
			}
			other := os.NewFile(uintptr(fds[0]), "other")
			defer other.Close()
			t.Setenv(TurnEnv, strconv.Itoa(fds[1]))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- Await(ctx) }()
			if n, err := other.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Errorf("it does not say that it waits: %d bytes, %v", n, err)
			}
			end(other, cancel)
			if err := <-done; err == nil {
				t.Error("no error")
			}
			if os.Getenv(TurnEnv) != "" {
				t.Error("its children would wait, too")
			}
		})
	}
	t.Setenv(TurnEnv, "x")
	if err := Await(t.Context()); err == nil {
		t.Error("a descriptor that is not a number")
	}
}

// TestDeaf: a socket that nobody reads is an error, and no hang.
func TestDeaf(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "@shoal-fdstore-test-nobody-is-here")
	s := Open()
	if err := s.Keep("x", os.Stdin); err == nil {
		t.Error("kept by nobody")
	}
}
