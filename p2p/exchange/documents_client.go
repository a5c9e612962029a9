package exchange

import (
	"context"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Document implements image.DocumentSource. As for an image, the server gives
// a sign of life while it asks the registry, and ctx bounds the whole.
func (c *Client) Document(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
	doc, err := c.openDocument(ctx, &req)
	if err != nil {
		return nil, fmt.Errorf("%.200q: %w", req.Ref, c.explain(err))
	}
	return doc, nil
}

func (c *Client) openDocument(ctx context.Context, req *image.DocumentRequest) (*image.Document, error) {
	msg, err := wire.NewDocumentRequest(req)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", blockdev.ErrUnsupported, err)
	}
	out, err := wire.AppendMessage(nil, msg)
	if err != nil {
		return nil, err
	}
	var doc *image.Document
	err = c.converse(ctx, c.docs, out, func(st *stream) (bool, error) {
		a := documentReader{c: c, st: st, head: req.Head, alive: req.Alive, start: time.Now()}
		var err error
		doc, err = a.read()
		return a.begun, err
	})
	return doc, err
}

// documentReader reads the frames of one answer.
type documentReader struct {
	c     *Client
	st    *stream
	head  bool
	alive func() // may be nil
	buf   []byte
	start time.Time
	begun bool // a frame has come
	idle  int  // frames that brought nothing
	doc   *image.Document
}

func (a *documentReader) read() (_ *image.Document, err error) {
	for a.doc == nil || !a.head && int64(len(a.doc.Data)) < a.doc.Size {
		if err := a.st.SetReadDeadline(time.Now().Add(a.c.silence(a.begun))); err != nil {
			return nil, err
		}
		if a.buf, err = wire.ReadFrame(a.st.r, wire.MaxDocumentFrame, a.buf); err != nil {
			return nil, err
		}
		a.begun = true
		if a.alive != nil {
			a.alive()
		}
		frame, err := wire.ParseDocumentFrame(a.buf)
		if err != nil {
			return nil, err
		}
		switch p := frame.Part.(type) {
		case *wire.DocumentFrame_Header:
			if a.doc != nil {
				return nil, fmt.Errorf("second header: %w", blockdev.ErrCorrupt)
			}
			h := p.Header
			a.doc = &image.Document{Digest: blockdev.Digest(h.Digest), MediaType: h.MediaType, Size: h.Size}
		case *wire.DocumentFrame_Data:
			// Grown as bytes come: a size that is only claimed costs nothing.
			if a.doc == nil || a.head || int64(len(a.doc.Data)+len(p.Data)) > a.doc.Size {
				return nil, fmt.Errorf("more data than the header says: %w", blockdev.ErrCorrupt)
			}
			a.doc.Data = append(a.doc.Data, p.Data...)
		case *wire.DocumentFrame_Error:
			return nil, p.Error.Err()
		default: // working, or a part of a later version
			a.idle++
			if err := checkIdle(a.idle, a.start); err != nil {
				return nil, err
			}
		}
	}
	return a.doc, nil
}
