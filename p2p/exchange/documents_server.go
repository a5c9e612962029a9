package exchange

import (
	"context"
	"fmt"
	"strings"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// serveDocuments answers the one request of a manifest stream.
func (s *Server) serveDocuments(st network.Stream) error {
	w := documentAnswer{answer{s: s, st: st}}
	b, err := w.request(wire.MaxDocumentRequest)
	if isEnd(err) {
		return nil
	} else if err != nil {
		return err
	}
	req, err := wire.ParseDocumentRequest(b)
	if err != nil {
		return w.fail(invalid(err))
	}
	if err := w.enter(documents, "manifests"); err != nil {
		return w.fail(wire.FromError(err))
	}
	defer w.done()

	doc, failed, err := w.open(st.Conn().RemotePeer().String(), req)
	s.stats.request(documents, failed)
	if err != nil {
		return err
	}
	if failed != nil {
		return w.fail(wire.FromError(failed))
	}
	if err := w.document(doc); err != nil {
		return err
	}
	return w.linger()
}

// documentAnswer writes the frames of one answer.
type documentAnswer struct{ answer }

func (a *documentAnswer) fail(e *wire.Error) error {
	return a.last(&wire.DocumentFrame{Part: &wire.DocumentFrame_Error{Error: e}})
}

// open asks for the document, and for a place to send it: a client that waits for a
// registry takes none from those whose document is there. Until then it tells the client
// that the server is at work. A document without a place is let go and not kept until there
// is one, so that the places bound the memory; when the client asks again, the document is
// at hand. failed is for the client to know, err is the stream's.
func (a *documentAnswer) open(from string, req *image.DocumentRequest) (doc *image.Document, failed, err error) {
	// A registry that hangs leaves others room to wait, however many nodes ask for what it has.
	host, _, _ := strings.Cut(req.Ref, "/")
	registry := blockdev.Sum([]byte(strings.ToLower(host)))
	if !a.s.asking.Try(registry, 1) {
		return nil, fmt.Errorf("requests for manifests of this registry are at their limit: %w", wire.ErrBusy), nil
	}
	err = a.await(a.s.cfg.Limits.WorkingInterval, func(ctx context.Context) {
		defer a.s.asking.Give(registry, 1)
		if doc, failed = a.s.cfg.Documents.DocumentFor(ctx, from, *req); failed != nil {
			return
		}
		if failed = checkDocument(req, doc); failed != nil || len(doc.Data) == 0 {
			return
		}
		if !a.s.sendingDocuments.TryAcquire(1) {
			doc, failed = nil, fmt.Errorf("manifests that are being sent are at their limit: %w", wire.ErrBusy)
			return
		}
		a.holds(a.s.sendingDocuments)
	}, func(bool) error {
		return a.write(&wire.DocumentFrame{Part: &wire.DocumentFrame_Working{Working: &wire.Working{}}})
	})
	if err != nil {
		return nil, context.Canceled, err
	}
	return doc, failed, nil
}

// document writes header and data.
func (a *documentAnswer) document(doc *image.Document) error {
	if len(doc.Data) == 0 {
		a.done()
	}
	header := &wire.DocumentHeader{Digest: doc.Digest[:], MediaType: doc.MediaType, Size: doc.Size}
	if err := a.write(&wire.DocumentFrame{Part: &wire.DocumentFrame_Header{Header: header}}); err != nil {
		return err
	}
	for b := doc.Data; len(b) > 0; {
		n := min(len(b), wire.MaxIndexData)
		if n == len(b) {
			a.done()
		}
		if err := a.write(&wire.DocumentFrame{Part: &wire.DocumentFrame_Data{Data: b[:n]}}); err != nil {
			return err
		}
		a.s.stats.bytes[documents].Add(float64(n))
		b = b[n:]
	}
	return nil
}

// checkDocument finds what a client would refuse.
func checkDocument(req *image.DocumentRequest, doc *image.Document) error {
	switch {
	case doc.Size > image.MaxDocument || len(doc.MediaType) > wire.MaxMediaType:
		return fmt.Errorf("%s has %d bytes and a media type of %d, at most %d and %d can be sent: %w",
			req.Ref, doc.Size, len(doc.MediaType), image.MaxDocument, wire.MaxMediaType, blockdev.ErrUnsupported)
	case req.Head && doc.Data != nil, !req.Head && doc.Size != int64(len(doc.Data)):
		return fmt.Errorf("%s: only %d of %d bytes are stored: %w", req.Ref, len(doc.Data), doc.Size, blockdev.ErrCorrupt)
	}
	return nil
}
