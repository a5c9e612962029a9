package exchange

import (
	"context"
	"fmt"

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

	var doc *image.Document
	var failed error
	err = w.await(s.cfg.Limits.WorkingInterval, func(ctx context.Context) {
		doc, failed = s.cfg.Documents.DocumentFor(ctx, st.Conn().RemotePeer().String(), *req)
	}, func(bool) error {
		return w.write(&wire.DocumentFrame{Part: &wire.DocumentFrame_Working{Working: &wire.Working{}}})
	})
	if err != nil {
		s.stats.request(documents, context.Canceled)
		return err
	}
	if failed == nil {
		failed = checkDocument(req, doc)
	}
	s.stats.request(documents, failed)
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
