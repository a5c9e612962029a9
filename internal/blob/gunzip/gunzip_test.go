package gunzip

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/iotest"

	kgzip "github.com/klauspost/compress/gzip"
)

// contents are what compressors make different kinds of blocks of.
func contents() map[string][]byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	words := make([]byte, 0, 2<<20)
	for len(words) < 1<<20 {
		words = fmt.Appendf(words, "entry %d of %d lies at %x\n", rnd.IntN(100), rnd.IntN(1000), rnd.Uint32())
	}
	// Matches of all short distances and many lengths, and some far back.
	var repeats []byte
	for range 4000 {
		from := rnd.IntN(40) + 1
		if rnd.IntN(8) == 0 {
			from = rnd.IntN(32 << 10)
		}
		if from > len(repeats) {
			repeats = append(repeats, noise[len(repeats):len(repeats)+from]...)
		}
		for range rnd.IntN(300) {
			repeats = append(repeats, repeats[len(repeats)-from])
		}
		repeats = append(repeats, byte(rnd.Uint32()))
	}
	// Counts that fall by half make the longest codes that there are.
	var skewed []byte
	for i := range 20 {
		skewed = append(skewed, bytes.Repeat([]byte{byte(i)}, 1<<(19-i))...)
	}
	rnd.Shuffle(len(skewed), func(i, j int) { skewed[i], skewed[j] = skewed[j], skewed[i] })
	return map[string][]byte{
		"empty": {}, "byte": {7}, "zeros": make([]byte, 1<<20), "noise": noise, "words": words, "repeats": repeats, "skewed": skewed,
		"mixed": bytes.Join([][]byte{words[:100_000], noise, make([]byte, 70_000), repeats, words[:5]}, nil),
	}
}

func compress(tb testing.TB, data []byte, level int) []byte {
	tb.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func gunzip(r io.Reader) ([]byte, error) {
	z, err := NewReader(r)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

func TestReader(t *testing.T) {
	for name, data := range contents() {
		for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, gzip.BestSpeed, gzip.DefaultCompression, gzip.BestCompression} {
			t.Run(fmt.Sprintf("%s/%d", name, level), func(t *testing.T) {
				gz := compress(t, data, level)
				for kind, r := range map[string]io.Reader{
					"whole":   bytes.NewReader(gz),
					"halves":  iotest.HalfReader(bytes.NewReader(gz)),
					"dataErr": iotest.DataErrReader(bytes.NewReader(gz)),
					"pieces":  &pieces{b: gz, rnd: rand.New(rand.NewPCG(3, 4))},
				} {
					got, err := gunzip(r)
					if err != nil || !bytes.Equal(got, data) {
						t.Errorf("%s: %d bytes of %d, %v", kind, len(got), len(data), err)
					}
				}
			})
		}
	}
}

// pieces gives a few bytes at a time.
type pieces struct {
	b   []byte
	rnd *rand.Rand
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), 1+p.rnd.IntN(40))], p.b)
	p.b = p.b[n:]
	return n, nil
}

func TestMembers(t *testing.T) {
	data := contents()
	var gz, want []byte
	for range 3 {
		for _, name := range []string{"words", "empty", "byte", "repeats"} {
			gz = append(gz, compress(t, data[name], 6)...)
			want = append(want, data[name]...)
		}
	}
	got, err := gunzip(bytes.NewReader(gz))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	// A match may not reach into the member before.
	member := compress(t, bytes.Repeat([]byte("abcdefgh"), 100), 6)
	far := append(bytes.Clone(member), headerOf(member)...)
	// A fixed block: the length code 257 (seven bits) and the distance code 0 (five).
	far = append(far, 0b0000_0011|1<<7, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	if _, err := gunzip(bytes.NewReader(far)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("match in the member before: %v", err)
	}
}

func headerOf(member []byte) []byte { return member[:10] }

func TestHeader(t *testing.T) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Name, w.Comment, w.Extra = "name", "comment", []byte("extra field")
	if _, err := w.Write([]byte("content")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := gunzip(&b); err != nil || string(got) != "content" {
		t.Errorf("%q, %v", got, err)
	}
}

// A stream that is cut anywhere gives no more than its content's beginning, and one
// of two errors of which only the one means damage.
func TestCut(t *testing.T) {
	data := contents()["mixed"][:200_000]
	gz := compress(t, data, 6)
	for n := 0; n < len(gz); n += 1 + n/10 {
		got, err := gunzip(bytes.NewReader(gz[:n]))
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut after %d of %d bytes: %v", n, len(gz), err)
		}
		if !bytes.HasPrefix(data, got) {
			t.Fatalf("cut after %d bytes: other content", n)
		}
	}
	broken := errors.New("broken")
	_, err := gunzip(io.MultiReader(bytes.NewReader(gz[:len(gz)/2]), iotest.ErrReader(broken)))
	if !errors.Is(err, broken) {
		t.Errorf("the source's error became %v", err)
	}
}

func TestDamage(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for name, data := range contents() {
		gz := compress(t, data, 6)
		for range 60 {
			bad := bytes.Clone(gz)
			bad[rnd.IntN(len(bad))] ^= 1 << rnd.IntN(8)
			if !same(t, bad) {
				t.Errorf("%s", name)
			}
		}
	}
}

// judge reads as compress/gzip does, but that what follows a member and does not begin
// as one is passed over.
func judge(input []byte) ([]byte, error) {
	src := bytes.NewReader(input)
	z, err := gzip.NewReader(src)
	if err != nil {
		return nil, err
	}
	var all []byte
	for {
		z.Multistream(false)
		b, err := io.ReadAll(io.LimitReader(z, int64(8<<20-len(all))))
		all = append(all, b...)
		rest := input[len(input)-src.Len():]
		if err == nil && bytes.Equal(rest, []byte{0x1f}) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil || len(all) == 8<<20 || !bytes.HasPrefix(rest, []byte{0x1f, 0x8b}) {
			return all, err
		}
		if err := z.Reset(src); err != nil {
			return all, err
		}
	}
}

// TestTrailing: what follows the last member is passed over as gzip(1) does it, however
// it comes.
func TestTrailing(t *testing.T) {
	content := []byte(strings.Repeat("content ", 1000))
	gz := compress(t, content, 6)
	for name, tail := range map[string]string{
		"nothing": "", "a zero": "\x00", "five zeros": "\x00\x00\x00\x00\x00", "a block of zeros": strings.Repeat("\x00", 512),
		"zeros and a member": strings.Repeat("\x00", 512) + string(gz), "text": "trailing garbage", "much": strings.Repeat("junk", 1<<17),
		"first byte of a member": "\x1f", "another byte": "x", "nearly a member": "\x1f\x8c", "a member": string(gz), "a member and text": string(gz) + "text",
		"part of a header": "\x1f\x8b", "part of a member": string(gz[:20]), "of an unknown method": "\x1f\x8b\x07" + strings.Repeat("x", 50),
	} {
		input := append(bytes.Clone(gz), tail...)
		cmd := exec.Command("gzip", "-dc")
		cmd.Stdin = bytes.NewReader(input)
		want, err := cmd.Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		refused := exit != nil && exit.ExitCode() != 2 // which is a warning
		if name == "another byte" {
			refused = false // gzip takes it for the start of a cut member, pigz does not
		}
		for how, src := range map[string]io.Reader{
			"at once": bytes.NewReader(input), "byte by byte": iotest.OneByteReader(bytes.NewReader(input)),
			"with its end": iotest.DataErrReader(bytes.NewReader(input)),
		} {
			z, err := NewReader(src)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(z)
			if (err != nil) != refused || err == nil && !bytes.Equal(got, want) {
				t.Errorf("%s, %s: %v, %d bytes; gzip: %v, %d bytes", name, how, err, len(got), exit, len(want))
			}
			if junk := !refused && tail != "" && name != "a member"; z.Trailing() != junk {
				t.Errorf("%s, %s: Trailing is %v", name, how, z.Trailing())
			}
		}
	}
	// A connection that breaks there is no end.
	broken := fmt.Errorf("broken: %w", io.EOF)
	for _, tail := range []string{"", "\x1f"} {
		if _, err := gunzip(io.MultiReader(bytes.NewReader(append(bytes.Clone(gz), tail...)), iotest.ErrReader(broken))); !errors.Is(err, broken) {
			t.Errorf("broken behind %q: %v", tail, err)
		}
	}
}

// same compares the Reader with compress/gzip, and says whether they agree.
func same(t *testing.T, input []byte) bool {
	t.Helper()
	want, wantErr := judge(input)
	var got []byte
	r, err := NewReader(bytes.NewReader(input))
	if err == nil {
		got, err = io.ReadAll(io.LimitReader(r, 8<<20))
	}
	switch {
	case (err == nil) != (wantErr == nil):
		t.Errorf("error %v, compress/gzip: %v", err, wantErr)
	case err == nil && !bytes.Equal(got, want):
		t.Errorf("%d bytes, other than the %d of compress/gzip", len(got), len(want))
	case err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF):
		t.Errorf("error of no kind: %v", err)
	default:
		return true
	}
	return false
}

func FuzzReader(f *testing.F) {
	for _, data := range contents() {
		for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, gzip.BestSpeed, gzip.BestCompression} {
			f.Add(compress(f, data[:min(len(data), 2000)], level))
		}
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		same(t, input)
		// Most mutations make a bad header: once more as a block of its own.
		same(t, append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff}, input...))
	})
}

func BenchmarkReader(b *testing.B) {
	// What layers have most of: a program, and what is written about it.
	program, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		b.Fatal(err)
	}
	data = append(data, contents()["words"]...)
	gz := compress(b, data, 6)
	for _, bench := range []struct {
		name string
		open func() (io.Reader, error)
	}{
		{"this", func() (io.Reader, error) { return NewReader(bytes.NewReader(gz)) }},
		{"klauspost", func() (io.Reader, error) { return kgzip.NewReader(bytes.NewReader(gz)) }},
		{"std", func() (io.Reader, error) { return gzip.NewReader(bytes.NewReader(gz)) }},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				r, err := bench.open()
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
