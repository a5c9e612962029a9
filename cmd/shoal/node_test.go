package main

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
)

// TestTakeTurn: a standby of shoal keep uses the config as it is when it is its turn, and
// the one that it has loaded before if what is there now is wrong.
func TestTakeTurn(t *testing.T) {
	for name, c := range map[string]struct {
		then string
		want int64
	}{
		"changed": {"prefetch_rate = \"2MiB\"\n", 2 << 20},
		"wrong":   {"prefetch_rate = \n", 1 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "node.toml")
			write := func(text string) {
				t.Helper()
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			load := func() (*config.Node, error) {
				c := config.DefaultNode()
				return c, loadNamed(path, true, c)
			}
			write("prefetch_rate = \"1MiB\"\n")
			first, err := load()
			if err != nil {
				t.Fatal(err)
			}
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
			if err != nil {
				t.Fatal(err)
			}
			turn := os.NewFile(uintptr(fds[0]), "turn")
			defer turn.Close()
			t.Setenv(fdstore.StandbyEnv, strconv.Itoa(fds[1]))
			done := make(chan error, 1)
			var got *config.Node
			go func() {
				var err error
				got, _, err = takeTurn(t.Context(), first, load)
				done <- err
			}()
			if _, err := turn.Read(make([]byte, 1)); err != nil { // it waits
				t.Fatal(err)
			}
			write(c.then)
			if err := fdstore.GoOn(turn, nil, nil); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if int64(got.PrefetchRate) != c.want {
				t.Errorf("prefetch_rate %d, want %d", got.PrefetchRate, c.want)
			}
		})
	}
}
