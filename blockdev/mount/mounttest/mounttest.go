// Package mounttest runs tests that mount.
package mounttest

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev/mount"
)

// Main runs a package's tests, whose temporary directories are in one of this run, and
// returns the code to exit with. Goroutines and mounts that passing tests leave behind make
// it a failure. Mounts of other runs do not matter: they are elsewhere.
func Main(m *testing.M) int {
	dir, err := os.MkdirTemp("", "shoal")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if err := os.Setenv("TMPDIR", dir); err != nil {
		fmt.Println(err)
		return 1
	}
	if code := m.Run(); code != 0 {
		_ = os.Remove(dir) // what is below it may be a mount that hangs
		return code
	}
	if err := goleak.Find(); err != nil {
		fmt.Println(err)
		return 1
	}
	left, err := mount.List(dir)
	for _, l := range left {
		fmt.Println("mount left behind:", l.Dir)
	}
	if err != nil || len(left) > 0 {
		fmt.Println("mounts below", dir, "after the tests:", len(left), err)
		return 1
	}
	if err := os.RemoveAll(dir); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}
