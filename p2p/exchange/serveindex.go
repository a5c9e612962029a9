package exchange

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

// serveIndex answers the one request of an index stream.
func (s *Server) serveIndex(st network.Stream) error {
	if err := st.SetReadDeadline(time.Now().Add(s.cfg.Limits.IdleTimeout)); err != nil {
		return err
	}
	b, err := wire.ReadFrame(&byteReader{Reader: st}, wire.MaxIndexRequest, nil)
	if isEnd(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	w := indexAnswer{s: s, st: st}
	req, err := wire.ParseIndexRequest(b)
	if err != nil {
		return w.fail(&wire.Error{Code: wire.Code_CODE_INVALID, Text: wire.CleanText(err.Error(), wire.MaxErrorText)})
	}
	from := st.Conn().RemotePeer()
	if !s.admit.enter(from, image) {
		s.stats.request(image, wire.ErrBusy)
		return w.fail(wire.FromError(fmt.Errorf("requests for images of this node, or in all, are at their limit: %w", wire.ErrBusy)))
	}
	// Left before the last bytes go out, as for chunks.
	w.leave = sync.OnceFunc(func() { s.admit.leave(from, image) })
	defer w.leave()

	img, failed, err := w.open(from.String(), req)
	s.stats.request(image, failed)
	if err != nil {
		return err
	}
	if failed != nil {
		return w.fail(wire.FromError(failed))
	}
	if err := w.image(img); err != nil {
		return err
	}
	// The client closes when it has read the end; until then a reset of ours
	// could overtake what is under way.
	if err := st.SetReadDeadline(time.Now().Add(s.cfg.Limits.WriteTimeout)); err != nil {
		return err
	}
	_, _ = io.CopyN(io.Discard, st, 1)
	return nil
}

// indexAnswer writes the frames of one answer.
type indexAnswer struct {
	s     *Server
	st    network.Stream
	buf   []byte
	leave func() // nil: nothing to leave
}

func (a *indexAnswer) write(m *wire.IndexFrame) (err error) {
	if a.buf, err = wire.AppendMessage(a.buf[:0], m); err != nil {
		return err
	}
	if err := a.st.SetWriteDeadline(time.Now().Add(a.s.cfg.Limits.WriteTimeout)); err != nil {
		return err
	}
	_, err = a.st.Write(a.buf)
	return err
}

// last writes the frame that ends the answer.
func (a *indexAnswer) last(m *wire.IndexFrame) error {
	if a.leave != nil {
		a.leave()
	}
	return a.write(m)
}

func (a *indexAnswer) fail(e *wire.Error) error {
	return a.last(&wire.IndexFrame{Part: &wire.IndexFrame_Error{Error: e}})
}

// open asks for the image and tells the client every few seconds that somebody
// is at it; that fails, and ends the work, once the client is gone. failed is
// for the client to know, err is the stream's.
func (a *indexAnswer) open(from string, req *blockdev.ImageRequest) (img *blockdev.Image, failed, err error) {
	ctx, cancel := context.WithCancel(a.s.ctx)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		img, failed = a.s.cfg.Images.OpenImageFor(ctx, from, *req)
	}()
	tick := time.NewTicker(a.s.cfg.Limits.WorkingInterval)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return img, failed, nil
		case <-tick.C:
			if err := a.write(&wire.IndexFrame{Part: &wire.IndexFrame_Working{Working: &wire.Working{}}}); err != nil {
				cancel()
				<-done
				return nil, context.Canceled, err
			}
		}
	}
}

// image writes header, indexes and end.
func (a *indexAnswer) image(img *blockdev.Image) error {
	if err := checkImage(img); err != nil {
		return a.fail(wire.FromError(err))
	}
	header := &wire.ImageHeader{Manifest: img.Manifest[:]}
	for i := range img.Layers {
		l := &img.Layers[i]
		header.Layers = append(header.Layers, &wire.LayerHeader{
			Digest: l.Digest[:], Size: l.Size, DiffId: l.DiffID[:], IndexLength: int64(len(l.Index)),
		})
	}
	if err := a.write(&wire.IndexFrame{Part: &wire.IndexFrame_Header{Header: header}}); err != nil {
		return err
	}
	for i := range img.Layers {
		for b := img.Layers[i].Index; len(b) > 0; {
			n := min(len(b), wire.MaxIndexData)
			part := &wire.IndexData{Layer: uint32(i), Data: b[:n]}
			if err := a.write(&wire.IndexFrame{Part: &wire.IndexFrame_Data{Data: part}}); err != nil {
				return err
			}
			a.s.stats.bytes[image].Add(float64(n))
			b = b[n:]
		}
	}
	return a.last(&wire.IndexFrame{Part: &wire.IndexFrame_End{End: &wire.End{}}})
}

// checkImage finds what a client would refuse.
func checkImage(img *blockdev.Image) error {
	if n := len(img.Layers); n > wire.MaxLayers {
		return fmt.Errorf("image %s has %d layers, at most %d can be sent: %w", img.Ref, n, wire.MaxLayers, blockdev.ErrUnsupported)
	}
	total := 0
	for i := range img.Layers {
		n := len(img.Layers[i].Index)
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
