package layer

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

var pin = flag.Bool("pin", false, "write testdata/pinned anew, from what Build makes now")

const pinnedFile = "testdata/pinned"

// odd is the corpus: every tar that is known to be awkward.
func odd() (names []string, tars [][]byte) {
	add := func(name string, diff []byte) {
		names, tars = append(names, strings.ReplaceAll(name, " ", "-")), append(tars, diff)
	}
	for _, tt := range trees {
		entries := tt.entries
		if tt.name == "sparse" {
			entries = nil
			for _, e := range tt.entries {
				if e.realSize < 1<<30 { // the chunk map of larger ones is large
					entries = append(entries, e)
				}
			}
		}
		add(tt.name, makeTar(entries...))
	}
	add("no end", makeTar(file("f", "content"))[:1024])
	add("garbage behind", append(makeTar(file("f", "content")), "garbage, of an odd length"...))
	add("large and small files", makeTar(file("big", string(randomBytes(1, 3<<20))), file("small", string(randomBytes(2, 20_000))), file("text", strings.Repeat("shoal ", 50_000))))
	var many []entry
	for i := range 3000 {
		many = append(many, file(fmt.Sprintf("d%d/%0*d", i%7, 1+i%60, i), strings.Repeat("x", i%700)))
	}
	add("many files", makeTar(many...))
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 77))
		add(fmt.Sprintf("random %d", seed), randomTar(r, 1+r.IntN(40), seed%2 == 0))
	}
	return names, tars
}

// describe says what Build makes of a diff, in three digests: of the diff, of what the
// builder may change with its version, and of what only the format's version may.
func describe(t *testing.T, diff []byte) (id, tree, data string) {
	ix, err := Build(t.Context(), bytes.NewReader(diff), newMemory().put, Options{})
	if err != nil {
		return short(blockdev.Sum(diff)), "refused", "refused"
	}
	h := sha256.New()
	for _, s := range append([]string{string(ix.Meta)}, ix.Implied...) {
		fmt.Fprintf(h, "%d %s", len(s), s)
	}
	tree = short(blockdev.Digest(h.Sum(nil)))
	h.Reset()
	for _, c := range ix.Chunks {
		fmt.Fprintf(h, "%d %s\n", c.Length, c.Digest)
	}
	return short(ix.DiffID), tree, short(blockdev.Digest(h.Sum(nil)))
}

func short(d blockdev.Digest) string { return hex.EncodeToString(d[:12]) }

// TestPinned: what Build makes of a diff does not change by accident, of a bug that is
// mended or of a new Go. Nodes of one version would call the indexes of another one lies.
func TestPinned(t *testing.T) {
	names, tars := odd()
	if *pin {
		var b strings.Builder
		fmt.Fprintf(&b, "builder %d\n", BuilderVersion)
		for i, diff := range tars {
			id, tree, data := describe(t, diff)
			fmt.Fprintln(&b, names[i], id, tree, data)
		}
		if err := os.WriteFile(pinnedFile, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	pinned, err := os.ReadFile(pinnedFile)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(pinned), "\n"), "\n")
	if want := fmt.Sprintf("builder %d", BuilderVersion); lines[0] != want {
		t.Fatalf("%s is of %s, and the code of %s: run `go test ./blockdev/layer -run TestPinned -pin` and read what has changed", pinnedFile, lines[0], want)
	}
	if lines = lines[1:]; len(lines) != len(tars) {
		t.Fatalf("%s has %d tars, the corpus %d: run `go test ./blockdev/layer -run TestPinned -pin`", pinnedFile, len(lines), len(tars))
	}
	refused := 0
	for i, diff := range tars {
		f := strings.Fields(lines[i])
		if len(f) != 4 || f[0] != names[i] {
			t.Fatalf("line %d of %s is %q, want that of %s", i+2, pinnedFile, lines[i], names[i])
		}
		id, tree, data := describe(t, diff)
		switch {
		case id != f[1]:
			t.Errorf("%s: the corpus makes another tar now. Either it was edited: then run `go test ./blockdev/layer -run TestPinned -pin`. Or the builder "+
				"takes other entries than before, which random tars are made of: then bump the builder version (layer.BuilderVersion), too", names[i])
		case data != f[3] && (data == "refused" || f[3] == "refused"):
			t.Errorf("%s: is %q now, and was %q: if that is meant, bump the builder version (layer.BuilderVersion), "+
				"run `go test ./blockdev/layer -run TestPinned -pin`, and say in the release notes that layers like this one are lazy no more, or from now on", names[i], data, f[3])
		case data != f[3]:
			t.Errorf("%s: the masked diff or its chunks have changed. No builder version covers that: nodes and supernodes of different versions would "+
				"accuse each other. If it must be, it takes a new version of the index format (docs/formats.md)", names[i])
		case tree != f[2]:
			t.Errorf("%s: the tree has changed: bump the builder version (layer.BuilderVersion), so that nodes that make the old tree "+
				"accuse nobody, and run `go test ./blockdev/layer -run TestPinned -pin`", names[i])
		}
		if tree == "refused" {
			refused++
		}
	}
	if refused > len(tars)/2 {
		t.Errorf("%d of %d tars are refused; the test has no teeth", refused, len(tars))
	}
}
