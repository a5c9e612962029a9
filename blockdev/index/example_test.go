package index_test

import (
	"errors"
	"fmt"
	"log"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
)

// Example sends an index of a diff of 1 MiB from one machine to another.
func Example() {
	ix, _ := blockdevtest.Diff(1, 1<<20)
	sent, err := index.Encode(ix)
	if err != nil {
		log.Fatal(err)
	}

	// What decoding it takes is known from the header alone.
	info, err := index.Peek(sent)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("the same chunks:", info.Chunks == len(ix.Chunks))

	got, err := index.Decode(sent)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("of the same diff:", got.DiffID == ix.DiffID, got.DiffSize)

	sent[len(sent)/2] ^= 1
	_, err = index.Decode(sent)
	fmt.Println("a flipped bit is found:", errors.Is(err, blockdev.ErrCorrupt))
	// Output:
	// the same chunks: true
	// of the same diff: true 1048576
	// a flipped bit is found: true
}
