package wire

import (
	"bufio"
	"bytes"
	"errors"
	"math"
	"reflect"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/profile"
)

func TestProfileReport(t *testing.T) {
	want := blockdev.DiffProfile{Diff: blockdev.Sum([]byte("d")), Profile: blockdev.Profile{{Chunk: 7, Rank: 0}, {Chunk: 3, Rank: 12}}}
	b, err := AppendMessage(nil, NewProfileReport(&want))
	if err != nil {
		t.Fatal(err)
	}
	if b, err = ReadFrame(bufio.NewReader(bytes.NewReader(b)), MaxProfileReport, nil); err != nil {
		t.Fatal(err)
	}
	got, err := ParseProfileReport(b)
	if err != nil || !reflect.DeepEqual(*got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	// The longest fits.
	var longest blockdev.Profile
	for i := range uint32(blockdev.MaxProfile) {
		chunk := i
		if i%2 == 1 {
			chunk = math.MaxUint32 - 1 - i
		}
		longest = append(longest, blockdev.Touch{Chunk: chunk, Rank: i * (math.MaxUint32 / blockdev.MaxProfile)})
	}
	if n := proto.Size(NewProfileReport(&blockdev.DiffProfile{Profile: longest})); n > MaxProfileReport {
		t.Errorf("%d bytes, at most %d are allowed", n, MaxProfileReport)
	}
	for name, m := range map[string]*ProfileReport{
		"no diff":       {Profile: []byte{0, 0}},
		"no profile":    {Diff: digests(1)},
		"short diff":    {Diff: digests(1)[1:], Profile: []byte{0, 0}},
		"cut profile":   {Diff: digests(1), Profile: []byte{0}},
		"chunk twice":   {Diff: digests(1), Profile: []byte{0, 0, 0, 0}},
		"too many rows": {Diff: digests(1), Profile: bytes.Repeat([]byte{2, 0}, blockdev.MaxProfile+1)},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ParseProfileReport(b); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if err := ParseProfileAnswer([]byte{0xff}); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("garbage for an answer: %v", err)
	}
}

func FuzzProfileReport(f *testing.F) {
	seed(f, &ProfileReport{Diff: digests(1), Profile: profile.Append(nil, blockdev.Profile{{Chunk: 7, Rank: 0}, {Chunk: 3, Rank: 12}})},
		&ProfileReport{}, &ProfileReport{Diff: digests(1), Profile: []byte{0x80}})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParseProfileReport(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if len(p.Profile) == 0 || len(p.Profile) > blockdev.MaxProfile {
			t.Fatalf("%d chunks", len(p.Profile))
		}
		if n := proto.Size(NewProfileReport(p)); n > MaxProfileReport {
			t.Fatalf("written again, it has %d bytes", n)
		}
	})
}

func FuzzProfileAnswer(f *testing.F) {
	seed(f, &ProfileAnswer{}, &ProfileAnswer{Error: &Error{Code: Code_CODE_BUSY, Text: "a\nb"}})
	f.Fuzz(func(t *testing.T, b []byte) {
		err := ParseProfileAnswer(b)
		if remote := (*RemoteError)(nil); errors.As(err, &remote) {
			checkText(t, FromError(err))
		} else if err != nil && !errors.Is(err, blockdev.ErrCorrupt) {
			t.Fatal(err)
		}
	})
}
