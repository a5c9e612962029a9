package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/layer"
)

// Example makes an index and chunks of a diff, and puts the diff together again from them.
func Example() {
	var diff bytes.Buffer
	w := tar.NewWriter(&diff)
	content := "hello from a layer\n"
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "etc/motd", Mode: 0o644, Size: int64(len(content))}); err != nil {
		log.Fatal(err)
	}
	if _, err := io.WriteString(w, content); err != nil {
		log.Fatal(err)
	}
	if err := w.Close(); err != nil {
		log.Fatal(err)
	}
	original := bytes.Clone(diff.Bytes())

	// Chunks come side by side, and their memory is used again.
	var mu sync.Mutex
	chunks := map[blockdev.Digest][]byte{}
	put := func(_ context.Context, d blockdev.Digest, data []byte) error {
		mu.Lock()
		defer mu.Unlock()
		chunks[d] = bytes.Clone(data)
		return nil
	}
	ix, err := layer.Build(context.Background(), &diff, put, layer.Options{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("directories without an entry:", ix.Implied)

	// The masked diff is the chunks, one after the other.
	var masked []byte
	for _, c := range ix.Chunks {
		masked = append(masked, chunks[c.Digest]...)
	}
	piece := func(_ context.Context, p blockdev.Piece) ([]byte, error) { return chunks[p.Digest], nil }
	var restored bytes.Buffer
	if err := layer.Restore(context.Background(), ix, bytes.NewReader(masked), piece, &restored); err != nil {
		log.Fatal(err)
	}
	fmt.Println("the diff again:", bytes.Equal(restored.Bytes(), original))
	// Output:
	// directories without an entry: [etc]
	// the diff again: true
}
