package cache

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"regexp"
	"strconv"
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
	m := regexp.MustCompile("(?s)```bitmap-example\n(.*?)```").FindSubmatch(page)
	if m == nil {
		t.Fatal("docs/formats.md has no example of a bitmap")
	}
	file := make([]byte, bitmapSize(1))
	for line := range strings.Lines(string(m[1])) {
		at, dump, _ := strings.Cut(line, "  ")
		off, err := strconv.ParseInt(at, 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		b, err := hex.DecodeString(strings.Join(strings.Fields(dump), ""))
		if err != nil {
			t.Fatal(err)
		}
		copy(file[off:], b)
	}
	fill := func(c byte) (d blockdev.Digest) {
		copy(d[:], bytes.Repeat([]byte{c}, len(d)))
		return d
	}
	want := bitmapHeader{complete: true, diffID: fill(0xee), index: fill(0xcc), diffSize: 5, chunks: 1}
	copy(want.boot[:], bytes.Repeat([]byte{0xbb}, 16))
	got, err := decodeHeader(file[:headerSize])
	if err != nil || got != want {
		t.Errorf("the page's header decodes to %+v, %v", got, err)
	}
	rec, ok := newRecordCodec(want.diffID).get(file[headerSize:], 0)
	if !ok || rec != (record{present: 1, synced: 1}) {
		t.Errorf("the page's record decodes to %+v, %v", rec, ok)
	}
	again := want.encode()
	again = append(again, make([]byte, recordSize)...)
	newRecordCodec(want.diffID).put(again[headerSize:], 0, rec)
	if !bytes.Equal(again, file) {
		t.Errorf("written anew the example is\n%s", hex.Dump(again))
	}
}

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
