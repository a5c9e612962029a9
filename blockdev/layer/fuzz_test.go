package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// smallLimits keep a fuzzer from building 256 MiB of metadata.
var smallLimits = Options{Workers: 1, MaxEntries: 20_000, MaxMetadata: 1 << 20, MaxInline: 1 << 20}

// FuzzBuild: whatever the bytes are, there is an error of the two kinds, or an
// index from which they can be restored.
func FuzzBuild(f *testing.F) {
	for _, tt := range trees {
		f.Add(makeTar(tt.entries...))
		f.Add(append(makeTar(tt.entries...), "seal"...))
	}
	for seed := range uint64(6) {
		f.Add(randomTar(rand.New(rand.NewPCG(seed, 7)), 6, true))
	}
	f.Fuzz(func(t *testing.T, diff []byte) {
		if bytes.Contains(diff, []byte("seal")) { // most changes die of a checksum
			diff = bytes.Clone(diff)
			for at := 0; at+tarBlock <= len(diff); at += tarBlock {
				if h := diff[at : at+tarBlock]; string(h[257:262]) == "ustar" {
					seal(h)
				}
			}
		}
		_, _, err := roundTrip(t, diff, smallLimits)
		if err != nil && !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, blockdev.ErrUnsupported) {
			t.Fatalf("neither corrupt nor unsupported: %v", err)
		}
		if err == nil || errors.Is(err, blockdev.ErrCorrupt) {
			checkReader(t, diff, err)
		}
	})
}

// checkReader compares with archive/tar reading the whole stream at once, as
// containerd has it do: both find the tar well-formed, or neither does.
func checkReader(t *testing.T, diff []byte, err error) {
	tr := tar.NewReader(struct{ io.Reader }{bytes.NewReader(diff)})
	var want error
	for want == nil {
		var hdr *tar.Header
		if hdr, want = tr.Next(); want == nil {
			if hdr.Size > 16<<20 { // it would give us every byte of a hole
				return
			}
			_, want = io.Copy(io.Discard, struct{ io.Reader }{tr})
		}
	}
	if errors.Is(want, io.EOF) {
		want = nil
	}
	if (want == nil) != (err == nil) {
		t.Fatalf("archive/tar says %v, we say %v", want, err)
	}
}

// FuzzRestore: a hostile header stream gives an error, and no more bytes than
// the index allows.
func FuzzRestore(f *testing.F) {
	m := newMemory()
	diff := makeTar(file("a", "content"), file("b", "more"))
	ix, err := Build(context.Background(), bytes.NewReader(diff), m.put, Options{Workers: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(m.data[ix.Headers[0].Digest], ix.DiffSize)
	f.Add([]byte{}, int64(0))
	f.Fuzz(func(t *testing.T, stream []byte, size int64) {
		if len(stream) > blockdev.MaxChunk {
			return
		}
		size &= 1<<20 - 1
		ix := &blockdev.Index{DiffSize: size, DiffID: blockdev.Sum(nil)}
		if len(stream) > 0 {
			ix.Headers = []blockdev.Piece{{Length: uint32(len(stream)), Digest: blockdev.Sum(stream)}}
		}
		get := func(context.Context, blockdev.Piece) ([]byte, error) { return stream, nil }
		var out bytes.Buffer
		err := Restore(t.Context(), ix, bytes.NewReader(make([]byte, size)), get, &out)
		if int64(out.Len()) > size {
			t.Fatalf("%d bytes of %d", out.Len(), size)
		}
		if err != nil && !errors.Is(err, blockdev.ErrCorrupt) || err == nil && size > 0 {
			t.Fatalf("error %v", err)
		}
	})
}
