package cache

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// TestFormatsPageProof does so for the example of a proof record.
func TestFormatsPageProof(t *testing.T) {
	page, err := os.ReadFile("../../docs/formats.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```proof-example\n(.*?)\n```").FindSubmatch(page)
	if m == nil {
		t.Fatal("docs/formats.md has no example of a proof record")
	}
	id := blockdev.Digest(bytes.Repeat([]byte{0xee}, 32))
	rec, err := decodeProof(m[1], id)
	if err != nil {
		t.Fatal(err)
	}
	again, err := json.Marshal(rec)
	if err != nil || !bytes.Equal(again, m[1]) {
		t.Errorf("written anew the example is %s, %v", again, err)
	}
}
