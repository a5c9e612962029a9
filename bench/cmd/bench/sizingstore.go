package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/supernode/store"
)

const terabyte = 1 << 40

// measureStores measures the memory of a supernode with a large store, which is made up.
func (z *sizing) measureStores(ctx context.Context) error {
	s, err := z.StartSupernode(ctx, "store", "")
	if err != nil {
		return err
	}
	if err := s.Stop(); err != nil {
		return err
	}
	for _, size := range []int64{terabyte / 4, terabyte / 2, terabyte} {
		say("a store of %d GB is made up", size>>30)
		layers, err := lab.MakeStore(z.Path("store", "store"), size)
		if err != nil {
			return err
		}
		if s, err = z.RestartSupernode(ctx, s); err != nil {
			return err
		}
		n, err := s.Metric(ctx, "shoal_supernode_store_layers")
		if err == nil && int(n) != layers {
			err = fmt.Errorf("the supernode has %.0f layers, and %d were made up", n, layers)
		}
		if err != nil {
			return err
		}
		own, err := settled(ctx, s)
		if err != nil {
			return err
		}
		z.add(rowStore, (own-z.idle)*terabyte/float64(size))
		if err := s.Stop(); err != nil {
			return err
		}
	}
	return nil
}

// measureRecords measures how large index.db is: it depends on the order in which records
// come, so this is the real store, and layers of as many chunks as make 64 MiB. The chunks
// are short; their records are not.
func (z *sizing) measureRecords(ctx context.Context) (err error) {
	const layers, perLayer = 256, lab.PackBytes / blockdev.AvgChunk
	say("records of %d GB of chunks are stored", layers*lab.PackBytes>>30)
	dir := z.Path("records")
	s, err := store.Open(store.Config{Dir: dir, Idle: 10 * time.Millisecond})
	if err != nil {
		return err
	}
	rnd := rand.NewChaCha8([32]byte{})
	for i := range layers {
		if err := putLayer(ctx, s, rnd, perLayer); err != nil {
			return errors.Join(err, s.Close())
		}
		// Between bursts of ingests a supernode compresses what it has stored raw, and has
		// a further record for a chunk until then.
		for i%8 == 7 && s.Stats().DueBytes > 0 {
			if err := sleep(ctx, 5*time.Millisecond); err != nil {
				return errors.Join(err, s.Close())
			}
		}
	}
	if err := s.Close(); err != nil {
		return err
	}
	used, err := usedPages(filepath.Join(dir, "index.db"))
	if err != nil {
		return err
	}
	z.add(rowRecords, float64(used)*terabyte/(layers*lab.PackBytes))
	return nil
}

// usedPages returns the bytes of a database's pages that are in use. The others are those
// that the last transactions have left for the next ones. Their number depends on the size
// of transactions more than on that of the database, so it must not be multiplied.
func usedPages(file string) (used int, err error) {
	db, err := bolt.Open(file, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
			st := b.Stats()
			used += st.BranchAlloc + st.LeafAlloc
			return nil
		})
	})
	return used, errors.Join(err, db.Close())
}

// putLayer stores a layer of n chunks, whose bytes are of no account.
func putLayer(ctx context.Context, s *store.Store, rnd *rand.ChaCha8, n int) error {
	var name blockdev.Digest
	_, _ = rnd.Read(name[:]) // never fails
	in, err := s.Begin(name)
	if err != nil {
		return err
	}
	chunks := make([]blockdev.Digest, n)
	for i := range chunks {
		var data [16]byte
		_, _ = rnd.Read(data[:])
		chunks[i] = blockdev.Sum(data[:])
		if err := in.Put(ctx, chunks[i], data[:]); err != nil {
			in.Abort()
			return err
		}
	}
	rec := store.LayerRecord{Layer: name, Size: lab.PackBytes, DiffID: blockdev.Sum(name[:]), Origins: []string{"registry.example/app"}}
	return in.Publish(ctx, rec, []byte{1}, slices.Values(chunks))
}

// measureImages ingests real images and asks for their indexes, as a node does.
func (z *sizing) measureImages(ctx context.Context) (err error) {
	if err := buildImages(ctx, z.images...); err != nil {
		return err
	}
	dir, err := lab.ImagesDir()
	if err != nil {
		return err
	}
	r, err := z.StartRegistry(ctx, "registry", filepath.Join(dir, "registry"), "")
	if err != nil {
		return err
	}
	s, err := z.StartSupernode(ctx, "images", "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Stop(), r.Stop()) }()
	before, err := s.Metric(ctx, "shoal_supernode_store_bytes")
	if err != nil {
		return err
	}
	crowd, err := (&sizing{Lab: z.Lab, nodes: 1}).connect(ctx, s)
	defer func() { err = errors.Join(err, crowd.close()) }()
	if err != nil {
		return err
	}
	info, err := host.ParseAddr(s.Address)
	if err != nil {
		return err
	}
	client, err := exchange.NewClient(crowd[0].host, info, exchange.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	var all int64 // bytes of all layers, each once
	known := map[blockdev.Digest]bool{}
	for _, name := range z.images {
		say("%s is ingested", name)
		im, err := client.FetchIndexes(ctx, image.Request{Ref: r.Addr + "/" + name + ":v1",
			Platform: image.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}})
		if err != nil {
			return err
		}
		var encoded, size int64
		for _, l := range im.Layers {
			ix, err := index.Decode(l.Index)
			if err != nil {
				return err
			}
			encoded, size = encoded+int64(len(l.Index)), size+ix.DiffSize
			if !known[l.DiffID] {
				known[l.DiffID] = true
				all += ix.DiffSize
			}
		}
		z.add(rowIndex, float64(encoded)*(1<<30)/float64(size))
	}
	most, err := peak(s)
	if err != nil {
		return err
	}
	z.add(rowIngest, most-z.idle)
	if err := s.Settle(ctx, 5*time.Minute); err != nil {
		return err
	}
	after, err := s.Metric(ctx, "shoal_supernode_store_bytes")
	if err != nil {
		return err
	}
	z.add(rowStored, (after-before)*(1<<30)/float64(all))
	return nil
}
