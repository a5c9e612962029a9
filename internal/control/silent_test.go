package control

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestSilent: a daemon that hangs is an error that says so, in seconds: one that
// takes connections and does not answer, and one that takes none.
func TestSilent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, err = Client{Path: path}.Status(t.Context()) // it queues, and nobody accepts it
	if !errors.Is(err, ErrSilent) || !strings.Contains(err.Error(), path) {
		t.Errorf("a daemon that does not answer: %v", err)
	}
	// Until the queue is full.
	for {
		c, err := net.DialTimeout("unix", path, 100*time.Millisecond)
		if err != nil {
			break
		}
		defer c.Close()
	}
	if _, err := (Client{Path: path}).Members(t.Context()); !errors.Is(err, ErrSilent) {
		t.Errorf("a daemon that takes no connection: %v", err)
	}
}
