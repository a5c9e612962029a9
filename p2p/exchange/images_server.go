package exchange

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/profile"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// serveImages answers the one request of an index stream.
func (s *Server) serveImages(st network.Stream) error {
	w := indexAnswer{answer{s: s, st: st}}
	b, err := w.request(wire.MaxImageRequest)
	if isEnd(err) {
		return nil
	} else if err != nil {
		return err
	}
	req, progress, err := wire.ParseImageRequest(b)
	if err != nil {
		return w.fail(invalid(err))
	}
	if err := w.enter(images, "images"); err != nil {
		return w.fail(wire.FromError(err))
	}
	defer w.done()

	img, failed, err := w.open(st.Conn().RemotePeer().String(), req, progress)
	s.stats.request(images, failed)
	if err != nil {
		return err
	}
	if failed != nil {
		return w.fail(wire.FromError(failed))
	}
	if err := w.image(img); err != nil {
		return err
	}
	return w.linger()
}

// indexAnswer writes the frames of one answer.
type indexAnswer struct{ answer }

func (a *indexAnswer) fail(e *wire.Error) error {
	return a.last(&wire.ImageFrame{Part: &wire.ImageFrame_Error{Error: e}})
}

// open asks for the image, and for a place to send it: a client that waits for an image
// takes none from those whose image is there. Until then it tells the client that
// somebody is at it, and how far it is. failed is for the client to know, err is the stream's.
func (a *indexAnswer) open(from string, req *image.Request, progress bool) (img *image.Image, failed, err error) {
	var news progressNews
	interval := a.s.cfg.Limits.WorkingInterval
	if progress {
		interval = min(interval, a.s.cfg.Limits.ProgressInterval)
		req.Progress = news.add
	}
	said := time.Now()
	err = a.await(interval, func(ctx context.Context) {
		if img, failed = a.s.cfg.Images.FetchIndexesFor(ctx, from, *req); failed != nil {
			return
		}
		if failed = a.s.sendingImages.Acquire(ctx, 1); failed == nil {
			a.holds(a.s.sendingImages)
		}
	}, func(first bool) error {
		layers := news.take()
		if len(layers) == 0 && !first && time.Since(said) < a.s.cfg.Limits.WorkingInterval/2 { // await may be early
			return nil
		}
		said = time.Now()
		return a.write(&wire.ImageFrame{Part: &wire.ImageFrame_Working{Working: wire.NewWorking(layers)}})
	})
	if err != nil {
		return nil, context.Canceled, err
	}
	return img, failed, nil
}

// progressNews is the last progress of each layer that the client has not been
// told of. An image has a bounded number of layers, and so have the news.
type progressNews struct {
	mu sync.Mutex
	m  map[blockdev.Digest]image.Progress
}

func (n *progressNews) add(p image.Progress) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.m == nil {
		n.m = map[blockdev.Digest]image.Progress{}
	}
	if _, known := n.m[p.Layer]; known || len(n.m) < wire.MaxLayers {
		n.m[p.Layer] = p
	}
}

func (n *progressNews) take() []image.Progress {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []image.Progress
	for _, p := range n.m {
		all = append(all, p)
	}
	clear(n.m)
	return all
}

// image writes header, indexes and end.
func (a *indexAnswer) image(img *image.Image) error {
	if err := checkImage(img); err != nil {
		return a.fail(wire.FromError(err))
	}
	header := &wire.ImageHeader{Manifest: img.Manifest[:], Grant: img.Grant, Relays: wire.NewRelays(img.Relays)}
	room := wire.MaxImageProfile
	for i := range img.Layers {
		l := &img.Layers[i]
		h := &wire.LayerHeader{Digest: l.Digest[:], Size: l.Size, DiffId: l.DiffID[:], IndexLength: int64(len(l.Index))}
		if l.IndexSize > 0 {
			h.IndexLength, h.IndexDigest = l.IndexSize, l.IndexDigest[:]
		}
		// What has no room is a hint less.
		if p := profile.Append(nil, l.Profile); len(p) <= room {
			h.Profile = p
			room -= len(p)
		}
		header.Layers = append(header.Layers, h)
	}
	if err := a.write(&wire.ImageFrame{Part: &wire.ImageFrame_Header{Header: header}}); err != nil {
		return err
	}
	for i := range img.Layers {
		for b := img.Layers[i].Index; len(b) > 0; {
			n := min(len(b), wire.MaxIndexData)
			part := &wire.IndexData{Layer: uint32(i), Data: b[:n]}
			if err := a.write(&wire.ImageFrame{Part: &wire.ImageFrame_Data{Data: part}}); err != nil {
				return err
			}
			a.s.stats.bytes[images].Add(float64(n))
			b = b[n:]
		}
	}
	return a.last(&wire.ImageFrame{Part: &wire.ImageFrame_End{End: &wire.End{}}})
}

// checkImage finds what a client would refuse.
func checkImage(img *image.Image) error {
	if n := len(img.Layers); n > wire.MaxLayers {
		return fmt.Errorf("image %s has %d layers, at most %d can be sent: %w", img.Ref, n, wire.MaxLayers, blockdev.ErrUnsupported)
	}
	total := 0
	for i := range img.Layers {
		n := len(img.Layers[i].Index) + int(img.Layers[i].IndexSize)
		if n > wire.MaxIndex {
			return fmt.Errorf("image %s: the index of layer %s has %d bytes, at most %d can be sent: %w",
				img.Ref, img.Layers[i].Digest, n, wire.MaxIndex, blockdev.ErrUnsupported)
		}
		total += n
	}
	if total > wire.MaxImageIndex {
		return fmt.Errorf("image %s: its indexes have %d bytes, at most %d can be sent: %w", img.Ref, total, wire.MaxImageIndex, blockdev.ErrUnsupported)
	}
	return nil
}
