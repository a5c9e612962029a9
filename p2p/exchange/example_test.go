package exchange_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
)

// memory is a store of chunks.
type memory map[blockdev.Digest][]byte

func (m memory) Chunk(_ context.Context, d blockdev.Digest) (exchange.Encoded, error) {
	data, ok := m[d]
	if !ok {
		return exchange.Encoded{}, blockdev.ErrNotFound
	}
	return exchange.Encoded{Data: data, Length: uint32(len(data))}, nil
}

// Example brings chunks from one machine to another.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	here, there := newHost(dir, "here"), newHost(dir, "there")
	defer func() { _, _ = here.Close(), there.Close() }()
	one, two := []byte("one chunk"), []byte("another")

	server, err := exchange.NewServer(there, exchange.ServerConfig{Chunks: memory{blockdev.Sum(one): one}})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	client, err := exchange.NewClient(here, peer.AddrInfo{ID: there.ID(), Addrs: there.Addrs()}, exchange.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	chunks := []blockdev.Chunk{{Digest: blockdev.Sum(one), Length: uint32(len(one))}, {Digest: blockdev.Sum(two), Length: uint32(len(two))}}
	err = client.Fetch(ctx, blockdev.Request{Priority: blockdev.Demand, Chunks: chunks}, func(i int, data []byte) error {
		fmt.Printf("chunk %d: %q\n", i, data)
		return chunks[i].Check(data) // nil: the bytes have the digest
	})
	fmt.Println("the other one is not there:", errors.Is(err, blockdev.ErrNotFound))
	// Output:
	// chunk 0: "one chunk"
	// the other one is not there: true
}

func newHost(dir, name string) libp2phost.Host {
	key, err := host.LoadIdentity(filepath.Join(dir, name))
	if err != nil {
		log.Fatal(err)
	}
	h, err := host.New(host.Config{Key: key, Listen: []string{"127.0.0.1:0"}})
	if err != nil {
		log.Fatal(err)
	}
	return h
}
