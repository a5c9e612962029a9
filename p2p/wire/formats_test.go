package wire

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"io"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/profile"
	"github.com/shoalfs/shoal/internal/image"
)

// TestFormatsPage decodes the example of docs/formats.md, so that the page stays
// true.
func TestFormatsPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/formats.md")
	if err != nil {
		t.Fatal(err)
	}
	example := func(name string) *bufio.Reader {
		m := regexp.MustCompile("(?s)```" + name + "\n(.*?)```").FindSubmatch(page)
		if m == nil {
			t.Fatalf("docs/formats.md has no block %s", name)
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
		return bufio.NewReader(bytes.NewReader(b))
	}
	fill := func(c byte) []byte { return bytes.Repeat([]byte{c}, digestLen) }

	r := example("wire-request")
	b, err := ReadFrame(r, MaxChunkRequest, nil)
	if err != nil {
		t.Fatal(err)
	}
	req, err := ParseChunkRequest(b)
	if err != nil {
		t.Fatal(err)
	}
	want := &ChunkRequest{Priority: Priority_PRIORITY_DEMAND, Diff: fill(0xee), Digests: append(fill(0xc1), fill(0xc2)...), TimeoutMs: 5000, AcceptZstd: true, Group: fill(0x9a), Hops: 1}
	if !proto.Equal(req, want) || r.Buffered() > 0 {
		t.Errorf("the page's request is %v, and %d bytes more", req, r.Buffered())
	}

	r = example("wire-answer")
	for i, check := range []func(*Frame) bool{
		func(f *Frame) bool {
			return f.Index == 0 && string(f.Data) == "hello" && f.Length == 5 && !f.Zstd && f.Err == nil && !f.End
		},
		func(f *Frame) bool {
			return f.Index == 1 && f.Err != nil && f.Err.Code == Code_CODE_NOT_FOUND && f.Err.Text == "gone" && !f.End
		},
		func(f *Frame) bool { return f.End && f.Err == nil },
	} {
		b, err := ReadFrame(r, MaxChunkFrame, nil)
		if err != nil {
			t.Fatal(err)
		}
		var f Frame
		if err := ParseChunkFrame(b, &f); err != nil || !check(&f) {
			t.Errorf("frame %d of the page's answer is %+v, %v", i, f, err)
		}
	}
	if r.Buffered() > 0 {
		t.Errorf("%d bytes behind the page's answer", r.Buffered())
	}

	enc, err := io.ReadAll(example("profile-example"))
	if err != nil {
		t.Fatal(err)
	}
	prof, err := profile.Decode(enc, 7)
	if want := (blockdev.Profile{{Chunk: 5, Rank: 0}, {Chunk: 6, Rank: 1}, {Chunk: 2, Rank: 5}}); err != nil || !reflect.DeepEqual(prof, want) {
		t.Errorf("the page's profile is %v, %v", prof, err)
	}

	if b, err = ReadFrame(example("member-request"), MaxMemberRequest, nil); err != nil {
		t.Fatal(err)
	}
	mr, err := ParseMemberRequest(b)
	if err != nil {
		t.Fatal(err)
	}
	addr := []byte{10, 0, 0, 5, 0x1e, 0x17}
	hello := &Hello{Token: "lab", Instance: bytes.Repeat([]byte{0x1d}, InstanceLen), Zone: "east", Addrs: [][]byte{addr}}
	if !proto.Equal(mr.GetHello(), hello) {
		t.Errorf("the page's hello is %v", mr)
	}
	r = example("member-events")
	for i, want := range []*MemberEvent{
		{Part: &MemberEvent_Welcome{Welcome: &Welcome{LeaseMs: 15000}}},
		{Part: &MemberEvent_Update{Update: &GroupUpdate{Group: fill(0xee), Version: 7, From: 6, Cell: 1, Zone: "east",
			Joined: []*GroupMember{{Key: fill(0xa1), Addrs: [][]byte{addr}}}, Left: fill(0xa2)}}},
	} {
		if b, err = ReadFrame(r, MaxMemberEvent, nil); err != nil {
			t.Fatal(err)
		}
		ev, err := ParseMemberEvent(b)
		if err != nil || !proto.Equal(ev, want) {
			t.Errorf("event %d of the page is %v, %v", i, ev, err)
		}
	}

	r = example("wire-manifest-request")
	if b, err = ReadFrame(r, MaxDocumentRequest, nil); err != nil {
		t.Fatal(err)
	}
	doc, err := ParseDocumentRequest(b)
	if err != nil || !reflect.DeepEqual(*doc, image.DocumentRequest{Ref: "r.io/a:1"}) || r.Buffered() > 0 {
		t.Errorf("the page's manifest request is %+v, %v, and %d bytes more", doc, err, r.Buffered())
	}
	r = example("wire-manifest-answer")
	for i, want := range []*DocumentFrame{
		{Part: &DocumentFrame_Header{Header: &DocumentHeader{Digest: sum([]byte("{}")), MediaType: "t/s", Size: 2}}},
		{Part: &DocumentFrame_Data{Data: []byte("{}")}},
	} {
		b, err := ReadFrame(r, MaxDocumentFrame, nil)
		if err != nil {
			t.Fatal(err)
		}
		if f, err := ParseDocumentFrame(b); err != nil || !proto.Equal(f, want) {
			t.Errorf("frame %d of the page's manifest answer is %v, %v; want %v", i, f, err, want)
		}
	}
	if r.Buffered() > 0 {
		t.Errorf("%d bytes behind the page's manifest answer", r.Buffered())
	}
}

func sum(b []byte) []byte {
	d := blockdev.Sum(b)
	return d[:]
}
