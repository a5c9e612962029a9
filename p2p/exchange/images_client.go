package exchange

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/profile"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// FetchIndexes implements image.Source. It may take as long as the server
// needs to fetch the image; the server gives a sign of life every few seconds,
// so that a dead one is found out, and ctx bounds the whole.
func (c *Client) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	img, err := c.fetchIndexes(ctx, &req)
	if err != nil {
		return nil, fmt.Errorf("image %.200q: %w", req.Ref, c.explain(err))
	}
	return img, nil
}

func (c *Client) fetchIndexes(ctx context.Context, req *image.Request) (*image.Image, error) {
	msg, err := wire.NewImageRequest(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", blockdev.ErrUnsupported, err)
	}
	out, err := wire.AppendMessage(nil, msg)
	if err != nil {
		return nil, err
	}
	var img *image.Image
	var refused error
	err = c.converse(ctx, c.images, out, func(st *stream) (bool, error) {
		a := imageAnswer{c: c, req: req, start: time.Now(), st: st}
		var err error
		img, err = a.read()
		if refused = a.refused; refused != nil {
			return true, nil // nothing is wrong with the server
		}
		return a.begun, err
	})
	if err == nil {
		err = refused
	}
	return img, err
}

// minBusy and maxBusy are the pauses before a busy server is asked again.
const (
	minBusy = 50 * time.Millisecond
	maxBusy = 2 * time.Second
)

// converse asks with a request of its own, again if the server is busy and
// Options.Patient says so.
func (c *Client) converse(ctx context.Context, l *lane, out []byte, take func(*stream) (begun bool, err error)) error {
	if err := l.enter(ctx); err != nil {
		return err
	}
	defer l.leave()
	var busy error // why it was asked again
	for pause := minBusy; ; pause = min(2*pause, maxBusy) {
		err := c.converseOnce(ctx, l, out, take)
		if err != nil && busy != nil && ctx.Err() != nil {
			return fmt.Errorf("%w, after: %w", err, busy)
		}
		if !c.opts.Patient || !c.only() || !errors.Is(err, wire.ErrBusy) {
			return err
		}
		busy = err
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
			return fmt.Errorf("%w, until the last: %w", contextError(ctx), err)
		case <-c.keeper.ctx.Done():
			return err
		}
	}
}

// converseOnce sends a request on a stream of its own and has take read the answer,
// which says whether any of it has come. If nothing has, and the connection has
// died unnoticed, it asks again.
func (c *Client) converseOnce(ctx context.Context, l *lane, out []byte, take func(*stream) (begun bool, err error)) error {
	ready := c.readyAgain
	if l == c.reports {
		ready = c.ready // nobody waits for it
	}
	for attempt := 1; ; attempt++ {
		if err := ready(ctx); err != nil {
			return err
		}
		begun, err := c.ask(ctx, l, out, take)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			c.keeper.report()
		}
		if attempt > 1 || begun || !c.broken(ctx, err) {
			return c.cause(ctx, err, c.silence(begun))
		}
	}
}

func (c *Client) ask(ctx context.Context, l *lane, out []byte, take func(*stream) (begun bool, err error)) (begun bool, err error) {
	st, err := l.get(ctx, true)
	if err != nil {
		return false, err
	}
	stop := context.AfterFunc(ctx, func() { _ = st.Reset() })
	defer stop()
	defer l.drop(st)
	if err := st.SetWriteDeadline(time.Now().Add(c.opts.ImageTimeout)); err != nil {
		return false, err
	}
	if _, err := st.Write(out); err != nil {
		return false, err
	}
	return take(st)
}

// silence is how long the server may be silent, which has begun to answer or not.
func (c *Client) silence(begun bool) time.Duration {
	if begun {
		return c.opts.ImageTimeout
	}
	return c.opts.FirstSign
}

// imageAnswer reads the frames of one answer.
type imageAnswer struct {
	c     *Client
	st    *stream
	req   *image.Request
	buf   []byte
	start time.Time
	begun bool // a frame has come
	idle  int  // frames that brought nothing

	img     *image.Image
	refused error   // by req.Admit
	lengths []int64 // of the indexes
	layer   int     // whose index comes next
}

func (a *imageAnswer) read() (_ *image.Image, err error) {
	for {
		if err := a.st.SetReadDeadline(time.Now().Add(a.c.silence(a.begun))); err != nil {
			return nil, err
		}
		if a.buf, err = wire.ReadFrame(a.st.r, wire.MaxImageFrame, a.buf); err != nil {
			return nil, err
		}
		a.begun = true
		if a.req.Alive != nil {
			a.req.Alive()
		}
		frame, err := wire.ParseImageFrame(a.buf)
		if err != nil {
			return nil, err
		}
		switch p := frame.Part.(type) {
		case *wire.ImageFrame_Header:
			err = a.header(p.Header)
		case *wire.ImageFrame_Data:
			err = a.data(p.Data)
		case *wire.ImageFrame_End:
			return a.img, a.end()
		case *wire.ImageFrame_Error:
			return nil, p.Error.Err()
		case *wire.ImageFrame_Working:
			a.progress(p.Working)
			err = a.nothing()
		default: // a part of a later version
			err = a.nothing()
		}
		if err != nil {
			return nil, err
		}
	}
}

func (a *imageAnswer) progress(w *wire.Working) {
	if a.req.Progress == nil || a.img != nil {
		return
	}
	for _, p := range w.Progress() {
		a.req.Progress(p)
	}
}

func (a *imageAnswer) nothing() error {
	a.idle++
	return checkIdle(a.idle, a.start)
}

// checkIdle allows for about 100 frames without content a second: many more than
// a server needs, too few to keep this one busy.
func checkIdle(frames int, since time.Time) error {
	if float64(frames) > 16+100*time.Since(since).Seconds() {
		return fmt.Errorf("%d frames without content: %w", frames, blockdev.ErrCorrupt)
	}
	return nil
}

func (a *imageAnswer) header(h *wire.ImageHeader) error {
	if a.img != nil {
		return fmt.Errorf("second image header: %w", blockdev.ErrCorrupt)
	}
	a.img = &image.Image{Ref: a.req.Ref, Manifest: blockdev.Digest(h.Manifest), Grant: h.Grant}
	var err error
	if a.img.Relays, err = wire.ParseRelays(h.Relays); err != nil {
		return err
	}
	var total int64
	for i, l := range h.Layers {
		layer := image.Layer{Digest: blockdev.Digest(l.Digest), Size: l.Size, DiffID: blockdev.Digest(l.DiffId)}
		if len(l.Profile) > 0 {
			if layer.Profile, err = profile.Decode(l.Profile, math.MaxUint32); err != nil {
				return fmt.Errorf("layer %d: %w", i, err)
			}
		}
		n := l.IndexLength
		switch {
		case n > wire.MaxIndex || total+n > wire.MaxImageIndex:
			return fmt.Errorf("layer %d: an index of %d bytes: at most %d are allowed, and %d for the image: %w",
				i, n, wire.MaxIndex, wire.MaxImageIndex, blockdev.ErrCorrupt)
		case n == 0 && !slices.Contains(a.req.Have, layer.Digest):
			return fmt.Errorf("layer %d (%s) comes without an index: %w", i, layer.Digest, blockdev.ErrCorrupt)
		}
		total += n
		if len(l.IndexDigest) > 0 {
			if !a.req.Relay {
				return fmt.Errorf("layer %d: other nodes are named instead of its index, and this was not requested: %w", i, blockdev.ErrCorrupt)
			}
			layer.IndexDigest, layer.IndexSize = blockdev.Digest(l.IndexDigest), n
			n = 0
		}
		a.lengths = append(a.lengths, n)
		a.img.Layers = append(a.img.Layers, layer)
	}
	if a.req.Admit != nil {
		if a.refused = a.req.Admit(total); a.refused != nil {
			return a.refused
		}
	}
	a.skip()
	return nil
}

// skip moves on to the next layer whose index is not complete.
func (a *imageAnswer) skip() {
	for a.layer < len(a.lengths) && int64(len(a.img.Layers[a.layer].Index)) == a.lengths[a.layer] {
		a.layer++
	}
}

func (a *imageAnswer) data(d *wire.IndexData) error {
	if a.img == nil || a.layer >= len(a.lengths) || int(d.Layer) != a.layer {
		return fmt.Errorf("data for layer %d where %d is next: %w", d.Layer, a.layer, blockdev.ErrCorrupt)
	}
	// Grown as bytes come: a length that is only claimed costs nothing.
	l := &a.img.Layers[a.layer]
	if int64(len(l.Index)+len(d.Data)) > a.lengths[a.layer] {
		return fmt.Errorf("layer %d: more than the %d bytes of index that were announced: %w", a.layer, a.lengths[a.layer], blockdev.ErrCorrupt)
	}
	if l.Index == nil {
		l.Index = d.Data // ParseImageFrame made it; nobody else has it
	} else {
		l.Index = append(l.Index, d.Data...)
	}
	a.skip()
	return nil
}

func (a *imageAnswer) end() error {
	if a.img == nil {
		return fmt.Errorf("answer ends without an image: %w", blockdev.ErrCorrupt)
	}
	if a.layer < len(a.lengths) {
		return fmt.Errorf("answer ends before the index of layer %d is complete: %w", a.layer, blockdev.ErrCorrupt)
	}
	return nil
}
