package disk

import (
	"os"
	"path/filepath"
	"testing"
)

// TestFileIs: a file is compared to its last byte, and no further than it is.
func TestFileIs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	want := make([]byte, 200_000)
	want[199_999] = 1
	for name, c := range map[string]struct {
		is   func() []byte
		same bool
	}{
		"equal":      {func() []byte { return want }, true},
		"last byte":  {func() []byte { return make([]byte, len(want)) }, false},
		"first byte": {func() []byte { b := append([]byte{1}, want[1:]...); return b }, false},
		"shorter":    {func() []byte { return want[:len(want)-1] }, false},
		"longer":     {func() []byte { return append(want[:len(want):len(want)], 0) }, false},
		"empty":      {func() []byte { return nil }, false},
	} {
		if err := os.WriteFile(path, c.is(), 0o600); err != nil {
			t.Fatal(err)
		}
		if same, err := Is(path, want); err != nil || same != c.same {
			t.Errorf("%s: %v, %v", name, same, err)
		}
	}
	if same, err := Is(path+".missing", nil); err != nil || same {
		t.Errorf("missing: %v, %v", same, err)
	}
}
