package wire

import (
	"bufio"
	"bytes"
	"errors"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

func seed(f *testing.F, ms ...proto.Message) {
	f.Helper()
	for _, m := range ms {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
}

func digests(n int) []byte { return make([]byte, 32*n) }

// checkText is what must hold for any text that came over the wire.
func checkText(t *testing.T, e *Error) {
	if e == nil {
		return
	}
	err := e.Err()
	text := err.Error()
	if len(text) > MaxErrorText || !utf8.ValidString(text) {
		t.Fatalf("error text %q", text)
	}
	for _, r := range text {
		if !unicode.IsPrint(r) {
			t.Fatalf("error text %q has %U", text, r)
		}
	}
	if again := FromError(err); again.Code != e.Code {
		t.Fatalf("code %v became %v", e.Code, again.Code)
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{1, 2}, 10)
	f.Add([]byte{0x80, 0x80, 0x80, 0x80, 0x80, 0x80}, 10)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, 1<<20)
	f.Fuzz(func(t *testing.T, b []byte, limit int) {
		limit &= 0xffff
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			m, err := ReadFrame(r, limit, nil)
			if err != nil {
				return
			}
			if len(m) > limit || cap(m) > limit+1024 {
				t.Fatalf("message of %d bytes, capacity %d, limit %d", len(m), cap(m), limit)
			}
		}
	})
}

func FuzzChunkRequest(f *testing.F) {
	seed(f, &ChunkRequest{Diff: digests(1), Digests: digests(2), Priority: 1, TimeoutMs: 5, AcceptZstd: true, Group: digests(1), Hops: 2},
		&ChunkRequest{}, &ChunkRequest{Diff: digests(1), Digests: digests(MaxDigests + 1)})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseChunkRequest(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if m.Count() < 1 || m.Count() > MaxDigests || len(m.Diff) != 32 {
			t.Fatalf("%d digests", m.Count())
		}
		_ = m.Digest(m.Count() - 1)
	})
}

// The parser written by hand agrees with the generated one.
func FuzzChunkFrame(f *testing.F) {
	seed(f, &ChunkFrame{Index: 1, Data: []byte("abc"), Length: 3}, &ChunkFrame{Data: []byte("abc"), Zstd: true, Length: 4},
		&ChunkFrame{End: true}, &ChunkFrame{End: true, Error: &Error{Code: 3, Text: "a\nb"}}, &ChunkFrame{Index: 255, Error: &Error{}})
	f.Add([]byte{0x12, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		var got Frame
		err := ParseChunkFrame(b, &got)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		checkText(t, got.Err)
		if got.Index < 0 || got.Index >= MaxDigests {
			t.Fatalf("index %d", got.Index)
		}
		if !got.End && got.Err == nil && (len(got.Data) == 0 || len(got.Data) > blockdev.MaxChunk || got.Length < 1 || got.Length > blockdev.MaxChunk) {
			t.Fatalf("%d bytes, length %d", len(got.Data), got.Length)
		}
		want := &ChunkFrame{}
		if err := proto.Unmarshal(b, want); err != nil {
			t.Fatalf("generated code refuses it: %v", err)
		}
		if int(want.Index) != got.Index || int(want.Length) != got.Length || want.Zstd != got.Zstd || want.End != got.End ||
			!bytes.Equal(want.Data, got.Data) || !proto.Equal(want.Error, got.Err) {
			t.Fatalf("got %+v, generated code reads %v", got, want)
		}
	})
}

func FuzzImageRequest(f *testing.F) {
	seed(f, &ImageRequest{Ref: "a", Manifest: digests(1), Platform: &Platform{Os: "linux"}, Credential: &Credential{Secret: "x"}, Have: digests(2), Relay: true},
		&ImageRequest{}, &ImageRequest{Ref: "a", Have: digests(MaxHave + 1)})
	f.Fuzz(func(t *testing.T, b []byte) {
		req, _, err := ParseImageRequest(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if _, err := NewImageRequest(req); err != nil {
			t.Fatalf("read, but not to be written: %v", err)
		}
	})
}

func FuzzImageFrame(f *testing.F) {
	layer := &LayerHeader{Digest: digests(1), Size: 5, DiffId: digests(1), IndexLength: 7}
	seed(f, &ImageFrame{Part: &ImageFrame_Working{}},
		&ImageFrame{Part: &ImageFrame_Working{Working: NewWorking([]image.Progress{{Stage: image.StageFetching, Done: 1, Total: 2}})}},
		&ImageFrame{Part: &ImageFrame_Header{Header: &ImageHeader{Manifest: digests(1), Layers: []*LayerHeader{layer, layer}}}},
		&ImageFrame{Part: &ImageFrame_Header{Header: &ImageHeader{Manifest: digests(1),
			Relays: []*Relay{{Key: digests(1), Addrs: [][]byte{{127, 0, 0, 1, 0, 9}}}},
			Layers: []*LayerHeader{{Digest: digests(1), DiffId: digests(1), IndexLength: 7, IndexDigest: digests(1)}}}}},
		&ImageFrame{Part: &ImageFrame_Data{Data: &IndexData{Layer: 1, Data: []byte("abc")}}},
		&ImageFrame{Part: &ImageFrame_End{}},
		&ImageFrame{Part: &ImageFrame_Error{Error: &Error{Code: Code_CODE_BUSY, Text: "later"}}})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseImageFrame(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		checkText(t, m.GetError())
		if h := m.GetHeader(); h != nil {
			if len(h.Layers) > MaxLayers || len(h.Manifest) != 32 {
				t.Fatalf("header with %d layers", len(h.Layers))
			}
		}
		checkProgress(t, m.GetWorking())
	})
}

func checkProgress(t *testing.T, w *Working) {
	all := w.Progress()
	if len(all) > MaxLayers {
		t.Fatalf("progress of %d layers", len(all))
	}
	for _, p := range all {
		if len(p.Stage) > MaxStage || p.Done < 0 || p.Total < 0 {
			t.Fatalf("progress %+v", p)
		}
	}
}

func FuzzDocumentRequest(f *testing.F) {
	seed(f, &DocumentRequest{Ref: "a/b:1", Kind: 1, Head: true, Credential: &Credential{Username: "u", Secret: "x"}},
		&DocumentRequest{}, &DocumentRequest{Ref: "a", Kind: 7})
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := ParseDocumentRequest(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if _, err := NewDocumentRequest(req); err != nil {
			t.Fatalf("read, but not to be written: %v", err)
		}
	})
}

func FuzzDocumentFrame(f *testing.F) {
	seed(f, &DocumentFrame{Part: &DocumentFrame_Working{}},
		&DocumentFrame{Part: &DocumentFrame_Header{Header: &DocumentHeader{Digest: digests(1), MediaType: "application/json", Size: 3}}},
		&DocumentFrame{Part: &DocumentFrame_Header{Header: &DocumentHeader{Digest: digests(1), MediaType: "a\nb"}}},
		&DocumentFrame{Part: &DocumentFrame_Header{Header: &DocumentHeader{Digest: digests(1), Size: image.MaxDocument + 1}}},
		&DocumentFrame{Part: &DocumentFrame_Data{Data: []byte("{}")}},
		&DocumentFrame{Part: &DocumentFrame_Error{Error: &Error{Code: Code_CODE_NOT_FOUND, Text: "gone"}}})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseDocumentFrame(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		checkText(t, m.GetError())
		checkProgress(t, m.GetWorking())
		if h := m.GetHeader(); h != nil {
			if len(h.Digest) != 32 || h.Size < 0 || h.Size > image.MaxDocument || len(h.MediaType) > MaxMediaType || strings.ContainsAny(h.MediaType, "\r\n\x00") {
				t.Fatalf("header %v", h)
			}
		}
	})
}

func FuzzMemberRequest(f *testing.F) {
	seed(f, &MemberRequest{Part: &MemberRequest_Hello{Hello: &Hello{Token: "t", Instance: make([]byte, InstanceLen), Zone: "z", Addrs: [][]byte{{10, 0, 0, 1, 30, 23}}}}},
		&MemberRequest{Part: &MemberRequest_Join{Join: &GroupJoin{Group: digests(1), Grant: []byte{1}}}},
		&MemberRequest{Part: &MemberRequest_Leave{Leave: &GroupLeave{Group: digests(1)}}},
		&MemberRequest{Part: &MemberRequest_Who{Who: &Who{Keys: digests(2)}}},
		&MemberRequest{Part: &MemberRequest_Renew{Renew: &Renew{}}}, &MemberRequest{})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMemberRequest(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if h := m.GetHello(); h != nil {
			if len(h.Instance) != InstanceLen || len(h.Addrs) > MaxAddrs || len(h.Zone) > MaxLabel {
				t.Fatalf("%v", h)
			}
			for _, a := range h.Addrs {
				checkAddr(t, a)
			}
		}
		if j := m.GetJoin(); j != nil && (len(j.Group) != 32 || len(j.Grant) > MaxGrant) {
			t.Fatalf("%v", j)
		}
		if w := m.GetWho(); w != nil && (len(w.Keys) == 0 || len(w.Keys) > 32*MaxWho || len(w.Keys)%32 != 0) {
			t.Fatalf("%v", w)
		}
	})
}

// checkAddr is what must hold for an address that was accepted.
func checkAddr(t *testing.T, b []byte) {
	ap, err := ParseAddr(b)
	if err != nil || ap.Port() == 0 || !ap.Addr().IsValid() {
		t.Fatalf("%v, %v", ap, err)
	}
	if again, err := ParseAddr(AppendAddr(nil, ap)); err != nil || again.Addr().Unmap() != ap.Addr().Unmap() || again.Port() != ap.Port() {
		t.Fatalf("%v is written as %v, %v", ap, again, err)
	}
}

func FuzzMemberEvent(f *testing.F) {
	m := &GroupMember{Key: digests(1), Rack: "r", Addrs: [][]byte{{10, 0, 0, 1, 30, 23}}}
	seed(f, &MemberEvent{Part: &MemberEvent_Welcome{Welcome: &Welcome{LeaseMs: 15000}}},
		&MemberEvent{Part: &MemberEvent_Error{Error: &Error{Code: 2, Text: "no"}}},
		&MemberEvent{Part: &MemberEvent_Update{Update: &GroupUpdate{Group: digests(1), Version: 2, From: 1, Cell: 3, Joined: []*GroupMember{m}, Left: digests(1),
			Cells: []*GroupCell{{Cell: 4, Zone: "z", Gateways: []*GroupMember{m}}}}}},
		&MemberEvent{Part: &MemberEvent_Refusal{Refusal: &GroupRefusal{Group: digests(1), Error: &Error{}}}},
		&MemberEvent{Part: &MemberEvent_Answer{Answer: &Answer{Key: digests(1), Groups: digests(2)}}})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMemberEvent(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		checkText(t, m.GetError())
		if r := m.GetRefusal(); r != nil {
			checkText(t, r.Error)
		}
		if u := m.GetUpdate(); u != nil {
			if len(u.Group) != 32 || u.From >= u.Version || len(u.Left)%32 != 0 {
				t.Fatalf("%v", u)
			}
			for _, c := range u.Cells {
				if len(c.Gateways) > MaxGateways {
					t.Fatalf("%d gateways", len(c.Gateways))
				}
			}
			for _, m := range u.Joined {
				if len(m.Key) != 32 || len(m.Addrs) > MaxAddrs {
					t.Fatalf("%v", m)
				}
			}
		}
	})
}
