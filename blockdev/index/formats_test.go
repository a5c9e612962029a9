package index

import (
	"bytes"
	"encoding/hex"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// TestFormatsPage decodes the example of docs/formats.md, so that the page stays
// true.
func TestFormatsPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/formats.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```index-example\n(.*?)```").FindSubmatch(page)
	if m == nil {
		t.Fatal("docs/formats.md has no example of an index")
	}
	var dump strings.Builder
	for line := range strings.Lines(string(m[1])) {
		_, bytes, _ := strings.Cut(line, "  ")
		dump.WriteString(strings.Join(strings.Fields(bytes), ""))
	}
	b, err := hex.DecodeString(dump.String())
	if err != nil {
		t.Fatal(err)
	}
	fill := func(c byte) (d blockdev.Digest) {
		copy(d[:], bytes.Repeat([]byte{c}, len(d)))
		return d
	}
	want := &blockdev.Index{
		DiffID:   fill(0xee),
		DiffSize: 5,
		Meta:     []byte("meta"),
		Chunks:   []blockdev.Chunk{{Length: 5, Digest: fill(0xcc)}},
		Headers:  []blockdev.Piece{{Length: 300, Digest: fill(0xdd)}},
		Implied:  []string{"a/b"},
	}
	got, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the page's example decodes to %+v", got)
	}
	h, err := decodeHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	again := encode(t, want)
	if !bytes.Equal(again[offChecksum:headerSize], b[offChecksum:headerSize]) {
		t.Error("the page's example has another checksum")
	}
	if h.bodySize() != 4+3+3+5 {
		t.Errorf("its body has %d bytes", h.bodySize())
	}
}
