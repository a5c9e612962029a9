package members

import (
	"path/filepath"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/p2p/host"
)

// TestRevokedAtOnce: of revocations, and what takes them back, that come at a time none
// is lost.
func TestRevokedAtOnce(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "revoked")
		r, err := openRevoked(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.set(host.FromKey([32]byte{200}), true); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				id, in := host.FromKey([32]byte{byte(i)}), true
				if i == 4 {
					id, in = host.FromKey([32]byte{200}), false
				}
				if err := r.set(id, in); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		again, err := openRevoked(path)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(again.list()); n != 4 || again.has(host.FromKey([32]byte{200})) {
			t.Fatalf("%d identities are in the file, want 4", n)
		}
	}
}
