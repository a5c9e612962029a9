package volume

import (
	"encoding/hex"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestFormatsPage decodes the example of docs/formats.md, so that the page stays
// true.
func TestFormatsPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/formats.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)up to ([0-9]+) bytes:\n\n```connection-example\n(.*?)```").FindSubmatch(page)
	if m == nil {
		t.Fatal("docs/formats.md has no example of a connection")
	}
	size, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	record := make([]byte, size)
	for line := range strings.Lines(string(m[2])) {
		at, dump, _ := strings.Cut(line, "  ")
		off, err := strconv.ParseInt(at, 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		b, err := hex.DecodeString(strings.Join(strings.Fields(dump), ""))
		if err != nil {
			t.Fatal(err)
		}
		copy(record[off:], b)
	}
	major, minor, init, err := decodeConnection(record)
	if err != nil || major != 0 || minor != 57 || len(init) != size-recordHeader {
		t.Errorf("the page's example decodes to %d:%d, %d bytes, %v", major, minor, len(init), err)
	}
	if _, _, _, err := decodeConnection(append(record, 0)); err == nil {
		t.Error("a byte behind the answer is taken")
	}
}
