package fdstore

import (
	"errors"
	"os"
	"testing"
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

// TestDeaf: a socket that nobody reads is an error, and no hang.
func TestDeaf(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "@shoal-fdstore-test-nobody-is-here")
	s := Open()
	if err := s.Keep("x", os.Stdin); err == nil {
		t.Error("kept by nobody")
	}
}
