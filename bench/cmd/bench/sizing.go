package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// The rows of bench sizing. The table in docs/install.md has the same ones: a test
// compares the names. The first is all of the resident memory. The other rows of memory
// are what comes on top of that: the process's own (lab.Process.Memory), as it is seen
// from outside, so with what Go's garbage collector has not collected or given back. A TB
// is 2^40 bytes, a GB 2^30.
const (
	rowIdle      = "a supernode without nodes and layers: memory"
	rowConnected = "1,000 nodes, connected: memory"
	rowOneImage  = "1,000 nodes with 1 image: memory"
	rowImages    = "1,000 nodes with 100 images: memory"
	rowStore     = "1 TB of chunks, uncompressed: memory"
	rowRecords   = "1 TB of chunks, uncompressed: index.db"
	rowIndex     = "1 GB of an image, uncompressed: index"
	rowStored    = "1 GB of images, uncompressed: store"
	rowIngest    = "images that are ingested: memory at most"
)

var sizingRows = []string{rowIdle, rowConnected, rowOneImage, rowImages, rowStore, rowRecords, rowIndex, rowStored, rowIngest}

// sizing collects the samples of each row, in MiB.
type sizing struct {
	*lab.Lab
	nodes  int
	images []string
	idle   float64 // bytes of memory, without that of files
	rows   map[string][]float64
}

func sizingCommand(o *options) *cobra.Command {
	var nodes int
	cmd := &cobra.Command{
		Use:   "sizing",
		Short: "Memory and disk of a supernode: for each 1,000 nodes, TB of store, GB of images",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if nodes < 1 {
				return fmt.Errorf("--nodes: %d nodes", nodes)
			}
			return benchSizing(cmd.Context(), o, nodes)
		},
	}
	cmd.Flags().IntVar(&nodes, "nodes", 1000, "how many nodes join; figures are for 1,000")
	return cmd
}

// sizingImages are ingested unless others are named.
var sizingImages = []string{"debian", "nginx", "redis", "python-django", "node-express"}

func benchSizing(ctx context.Context, o *options, nodes int) (err error) {
	l, err := lab.New(o.bin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	z := &sizing{Lab: l, nodes: nodes, images: sizingImages, rows: map[string][]float64{}}
	if len(o.images) > 0 {
		z.images = o.images
	}
	for _, measure := range []func(context.Context) error{z.measureMembers, z.measureStores, z.measureRecords, z.measureImages} {
		if err := measure(ctx); err != nil {
			return err
		}
	}
	var r report.Report
	for _, name := range sizingRows {
		if len(z.rows[name]) == 0 {
			return fmt.Errorf("%s: nothing was measured", name)
		}
		r.Note(name, "MiB", z.rows[name]...)
	}
	if err := r.Print(os.Stdout); err != nil {
		return err
	}
	return r.Save(o.out, "sizing")
}

// add adds a sample, in bytes.
func (z *sizing) add(row string, bytes float64) {
	mib := bytes / (1 << 20)
	say("%s: %.1f MiB", row, mib)
	z.rows[row] = append(z.rows[row], mib)
}

// settled returns a supernode's own memory, in bytes, once that has changed little for five
// seconds, or after half a minute.
func settled(ctx context.Context, s *lab.Supernode) (float64, error) {
	const quiet, most = 5, 30 // samples, one a second
	var last float64
	for i, same := 0, 0; same < quiet && i < most; i++ {
		if err := sleep(ctx, time.Second); err != nil {
			return 0, err
		}
		own, _, err := s.Memory()
		if err != nil {
			return 0, errors.Join(err, s.Alive())
		}
		if now := float64(own); math.Abs(now-last) > 0.02*last {
			last, same = now, 0
		} else {
			same++
		}
	}
	return last, nil
}

// peak is the most memory of its own that the supernode has had, in bytes.
func peak(s *lab.Supernode) (float64, error) {
	_, most, err := s.RSS()
	if err != nil {
		return 0, err
	}
	_, files, err := s.Memory()
	return float64(most - files), err
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
