package wire

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"unicode"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

func frameOf(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := AppendMessage(nil, m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadFrame(t *testing.T) {
	msg := frameOf(t, &ImageRequest{Ref: "docker.io/library/redis:7"})
	r := bufio.NewReader(bytes.NewReader(append(msg, msg...)))
	for range 2 {
		b, err := ReadFrame(r, MaxImageRequest, nil)
		if err != nil {
			t.Fatal(err)
		}
		req, _, err := ParseImageRequest(b)
		if err != nil || req.Ref != "docker.io/library/redis:7" {
			t.Fatalf("%v, %v", req, err)
		}
	}
	if _, err := ReadFrame(r, MaxImageRequest, nil); !errors.Is(err, io.EOF) || errors.Is(err, blockdev.ErrCorrupt) {
		t.Fatalf("at the end: %v, want io.EOF", err)
	}
	for _, c := range []struct {
		name string
		in   []byte
		want error
	}{
		{"cut in the length", []byte{0x80}, io.ErrUnexpectedEOF},
		{"cut after the length", []byte{5}, io.ErrUnexpectedEOF},
		{"cut in the message", []byte{5, 1, 2}, io.ErrUnexpectedEOF},
		{"too long", []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 1}, blockdev.ErrCorrupt},
		{"endless varint", bytes.Repeat([]byte{0x80}, 10), blockdev.ErrCorrupt},
	} {
		if _, err := ReadFrame(bufio.NewReader(bytes.NewReader(c.in)), 100, nil); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

func TestReadFrameReusesBuffer(t *testing.T) {
	msg := frameOf(t, &Error{Text: strings.Repeat("x", 100)})
	buf := make([]byte, 200)
	b, err := ReadFrame(bufio.NewReader(bytes.NewReader(msg)), 200, buf)
	if err != nil || &b[0] != &buf[0] {
		t.Fatalf("buffer of 200 bytes not used for a message of %d: %v", len(b), err)
	}
}

// The header that is written by hand, with the data behind it, is the message
// that generated code writes: the same for every field in use.
func TestChunkHeaderIsChunkFrame(t *testing.T) {
	for _, data := range [][]byte{{1}, bytes.Repeat([]byte("ab"), 100), make([]byte, blockdev.MaxChunk)} {
		for _, index := range []int{0, 1, MaxDigests - 1} {
			for _, zstd := range []bool{false, true} {
				length := len(data)
				if zstd {
					length = blockdev.MaxChunk
				}
				b := append(AppendChunkHeader(nil, index, zstd, length, len(data)), data...)
				b, err := ReadFrame(bufio.NewReader(bytes.NewReader(b)), MaxChunkFrame, nil)
				if err != nil {
					t.Fatal(err)
				}
				got := &ChunkFrame{}
				if err := proto.Unmarshal(b, got); err != nil {
					t.Fatal(err)
				}
				want := &ChunkFrame{Index: uint32(index), Data: data, Zstd: zstd, Length: uint32(length)}
				if !proto.Equal(got, want) {
					t.Fatalf("index %d, zstd %v, %d bytes: generated code reads another message", index, zstd, len(data))
				}
				var f Frame
				if err := ParseChunkFrame(b, &f); err != nil {
					t.Fatal(err)
				}
				if f.Index != index || f.Zstd != zstd || f.Length != length || !bytes.Equal(f.Data, data) {
					t.Fatalf("parsed %d %v %d", f.Index, f.Zstd, f.Length)
				}
			}
		}
	}
}

func TestParseChunkFrameRefuses(t *testing.T) {
	big := make([]byte, blockdev.MaxChunk+1)
	for name, m := range map[string]*ChunkFrame{
		"nothing":             {},
		"no length":           {Data: []byte{1}},
		"wrong length":        {Data: []byte{1}, Length: 2},
		"data too long":       {Data: big, Length: uint32(len(big))},
		"claims too much":     {Data: []byte{1}, Zstd: true, Length: blockdev.MaxChunk + 1},
		"empty chunk":         {Zstd: true, Length: 5},
		"error and data":      {Data: []byte{1}, Length: 1, Error: &Error{}},
		"end and data":        {Data: []byte{1}, Length: 1, End: true},
		"index out of bounds": {Data: []byte{1}, Length: 1, Index: MaxDigests},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var f Frame
		if err := ParseChunkFrame(b, &f); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
}

// A later version may add fields to any message.
func TestUnknownFieldsAreIgnored(t *testing.T) {
	// Field 99: a varint, bytes, and fixed 64.
	extra := []byte{0x98, 0x06, 0x07, 0x9a, 0x06, 0x02, 'h', 'i', 0x99, 0x06, 1, 2, 3, 4, 5, 6, 7, 8}
	d := blockdev.Sum(nil)
	marshal := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return append(b, extra...)
	}
	if m, err := ParseChunkRequest(marshal(&ChunkRequest{Diff: d[:], Digests: d[:]})); err != nil || m.Count() != 1 || m.Digest(0) != d {
		t.Errorf("chunk request: %v, %v", m, err)
	}
	var f Frame
	if err := ParseChunkFrame(marshal(&ChunkFrame{Index: 3, Data: []byte{1}, Length: 1}), &f); err != nil || f.Index != 3 {
		t.Errorf("chunk frame: %+v, %v", f, err)
	}
	if _, _, err := ParseImageRequest(marshal(&ImageRequest{Ref: "a"})); err != nil {
		t.Errorf("index request: %v", err)
	}
	if m, err := ParseImageFrame(extra); err != nil || m.Part != nil {
		t.Errorf("index frame with an unknown part: %v, %v", m, err)
	}
}

func TestImageRequestRoundTrip(t *testing.T) {
	for _, want := range []image.Request{
		{Ref: "docker.io/library/redis:7"},
		{
			Ref:        "[::1]:5000/a/b@sha256:00",
			Manifest:   blockdev.Sum([]byte("m")),
			Platform:   image.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"},
			Credential: image.Credential{Username: "u", Secret: "s"},
			Have:       []blockdev.Digest{blockdev.Sum([]byte("1")), blockdev.Sum([]byte("2"))},
		},
	} {
		m, err := NewImageRequest(&want)
		if err != nil {
			t.Fatal(err)
		}
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got, _, err := ParseImageRequest(b)
		if err != nil || !reflect.DeepEqual(*got, want) {
			t.Fatalf("got %+v, %v; want %+v", got, err, want)
		}
	}
}

func TestRequestsRefused(t *testing.T) {
	secret := strings.Repeat("s3cret", MaxCredential)
	long := func(n int) string { return strings.Repeat("x", n+1) }
	for name, req := range map[string]image.Request{
		"no ref":          {},
		"long ref":        {Ref: long(MaxRef)},
		"long platform":   {Ref: "a", Platform: image.Platform{Variant: long(MaxPlatform)}},
		"long credential": {Ref: "a", Credential: image.Credential{Secret: secret}},
		"too many known":  {Ref: "a", Have: make([]blockdev.Digest, MaxHave+1)},
	} {
		_, err := NewImageRequest(&req)
		if err == nil {
			t.Errorf("%s: accepted", name)
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: the error holds the credential", name)
		}
	}
	d := make([]byte, 32)
	for name, m := range map[string]*ChunkRequest{
		"no diff":        {Digests: d},
		"no digests":     {Diff: d},
		"part of a one":  {Diff: d, Digests: make([]byte, 33)},
		"too many":       {Diff: d, Digests: make([]byte, 32*(MaxDigests+1))},
		"diff too short": {Diff: d[:31], Digests: d},
		"group":          {Diff: d, Digests: d, Group: d[:5]},
		"hops":           {Diff: d, Digests: d, Hops: MaxHops + 1},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseChunkRequest(b); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", name, err)
		}
	}
	// The largest of each kind must fit the limit of its frame.
	if n := proto.Size(&ChunkRequest{Priority: 1, Diff: d, Digests: make([]byte, 32*MaxDigests), TimeoutMs: 1 << 31, AcceptZstd: true, Group: d, Hops: MaxHops}); n > MaxChunkRequest {
		t.Errorf("largest chunk request: %d bytes > %d", n, MaxChunkRequest)
	}
	text := long(MaxErrorText)
	if n := proto.Size(&ChunkFrame{Index: 1 << 31, Error: &Error{Code: 9, Text: text}, End: true}); n > MaxChunkFrame {
		t.Errorf("largest error frame: %d bytes > %d", n, MaxChunkFrame)
	}
	header := &ImageHeader{Manifest: d}
	for range MaxLayers {
		header.Layers = append(header.Layers, &LayerHeader{Digest: d, DiffId: d, Size: 1 << 62, IndexLength: 1 << 62})
	}
	if n := proto.Size(&ImageFrame{Part: &ImageFrame_Header{Header: header}}); n > MaxImageFrame {
		t.Errorf("largest header: %d bytes > %d", n, MaxImageFrame)
	}
}

func TestErrorsBothWays(t *testing.T) {
	for _, sentinel := range []error{
		blockdev.ErrNotFound, blockdev.ErrUnauthorized, blockdev.ErrUnsupported, blockdev.ErrUnavailable,
		blockdev.ErrCorrupt, blockdev.ErrNoSpace, ErrBusy,
	} {
		err := FromError(fmt.Errorf("image x: %w", sentinel)).Err()
		if !errors.Is(err, sentinel) {
			t.Errorf("%v came back as %v", sentinel, err)
		}
		if err.Error() != "image x: "+sentinel.Error() {
			t.Errorf("text %q", err)
		}
		// A peer that passes an error on does not change its code.
		if again := FromError(fmt.Errorf("supernode: %w", err)).Err(); !errors.Is(again, sentinel) {
			t.Errorf("%v passed on came back as %v", sentinel, again)
		}
	}
	if !errors.Is(ErrBusy, blockdev.ErrUnavailable) {
		t.Error("ErrBusy is not ErrUnavailable")
	}
	for _, err := range []error{errors.New("open /x: permission denied"), context.DeadlineExceeded, context.Canceled} {
		if back := FromError(err).Err(); !errors.Is(back, blockdev.ErrUnavailable) || back.Error() != err.Error() {
			t.Errorf("%v came back as %v", err, back)
		}
	}
	for _, code := range []Code{0, Code_CODE_INVALID, Code_CODE_INTERNAL, 77} {
		if err := (&Error{Code: code}).Err(); !errors.Is(err, blockdev.ErrUnavailable) || err.Error() == "" {
			t.Errorf("code %d gives %q", code, err)
		}
	}
}

func TestCleanText(t *testing.T) {
	for in, want := range map[string]string{
		"plain: Grüße":             "plain: Grüße",
		"a\r\nlevel=error\x1b[31m": "a  level=error [31m",
		"\xff\xfe\x00":             "",
		"a\u202eb\u2028c":          "a b c",
	} {
		if got := CleanText(in, 100); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := CleanText(strings.Repeat("ü", 1000), 101); len(got) > 101 || strings.ContainsRune(got, unicode.ReplacementChar) {
		t.Errorf("%d bytes, %q", len(got), got)
	}
}

func BenchmarkParseChunkFrame(b *testing.B) {
	data := make([]byte, 64<<10)
	msg := append(AppendChunkHeader(nil, 7, false, len(data), len(data)), data...)[3:]
	var f Frame
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if err := ParseChunkFrame(msg, &f); err != nil {
			b.Fatal(err)
		}
	}
}
