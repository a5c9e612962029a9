package wire

import (
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/internal/image"
)

// Limits of the manifest protocol, in bytes.
const (
	// MaxMediaType is the longest DocumentHeader.media_type (RFC 6838, 4.2: type
	// and subtype have at most 127 characters each).
	MaxMediaType = 255
	// MaxDocumentRequest and MaxDocumentFrame bound the messages of these names.
	MaxDocumentRequest = MaxRef + 2*MaxCredential + slack
	MaxDocumentFrame   = MaxIndexData + slack
)

// NewDocumentRequest puts req into a message. An error names what is too long.
func NewDocumentRequest(req *image.DocumentRequest) (*DocumentRequest, error) {
	m := &DocumentRequest{
		Ref: req.Ref, Head: req.Head,
		Credential: &Credential{Username: req.Credential.Username, Secret: req.Credential.Secret},
	}
	if req.Kind == image.ConfigDocument {
		m.Kind = DocumentKind_DOCUMENT_KIND_CONFIG
	}
	if err := checkDocumentRequest(m); err != nil {
		return nil, err
	}
	return m, nil
}

// ParseDocumentRequest reads and checks a DocumentRequest. Errors wrap
// blockdev.ErrCorrupt; they never hold the credential.
func ParseDocumentRequest(b []byte) (*image.DocumentRequest, error) {
	m := &DocumentRequest{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, corrupt("manifest request", err)
	}
	if err := checkDocumentRequest(m); err != nil {
		return nil, corrupt("manifest request", err)
	}
	c := m.GetCredential()
	req := &image.DocumentRequest{
		Ref: m.Ref, Head: m.Head,
		Credential: image.Credential{Username: c.GetUsername(), Secret: c.GetSecret()},
	}
	if m.Kind == DocumentKind_DOCUMENT_KIND_CONFIG {
		req.Kind = image.ConfigDocument
	}
	return req, nil
}

func checkDocumentRequest(m *DocumentRequest) error {
	c := m.GetCredential()
	switch {
	case m.Ref == "":
		return fmt.Errorf("empty reference")
	case len(m.Ref) > MaxRef:
		return fmt.Errorf("reference of %d bytes, at most %d are allowed", len(m.Ref), MaxRef)
	case m.Kind != DocumentKind_DOCUMENT_KIND_MANIFEST && m.Kind != DocumentKind_DOCUMENT_KIND_CONFIG:
		return fmt.Errorf("document kind %d is not known", m.Kind)
	case len(c.GetUsername()) > MaxCredential || len(c.GetSecret()) > MaxCredential:
		return fmt.Errorf("credential with a field of more than %d bytes", MaxCredential)
	}
	return nil
}

// ParseDocumentFrame reads and checks a DocumentFrame: the header's fields, that
// data is 1 to MaxIndexData bytes. A part that this version does not know gives a
// frame without part, to be skipped. Errors wrap blockdev.ErrCorrupt.
func ParseDocumentFrame(b []byte) (*DocumentFrame, error) {
	m := &DocumentFrame{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, corrupt("manifest frame", err)
	}
	switch p := m.Part.(type) {
	case *DocumentFrame_Header:
		h := p.Header
		switch {
		case len(h.GetDigest()) != digestLen:
			return nil, corrupt("manifest frame", fmt.Errorf("digest of %d bytes, not %d", len(h.GetDigest()), digestLen))
		case len(h.GetMediaType()) > MaxMediaType || CleanText(h.GetMediaType(), MaxMediaType) != h.GetMediaType():
			return nil, corrupt("manifest frame", fmt.Errorf("media type %.40q of %d bytes", h.GetMediaType(), len(h.GetMediaType())))
		case h.GetSize() < 0 || h.GetSize() > image.MaxDocument:
			return nil, corrupt("manifest frame", fmt.Errorf("document of %d bytes, not 0 to %d", h.GetSize(), image.MaxDocument))
		}
	case *DocumentFrame_Data:
		if n := len(p.Data); n == 0 || n > MaxIndexData {
			return nil, corrupt("manifest frame", fmt.Errorf("%d bytes of data, not 1 to %d", n, MaxIndexData))
		}
	case *DocumentFrame_Working:
		if err := checkWorking(p.Working); err != nil {
			return nil, corrupt("manifest frame", err)
		}
	}
	return m, nil
}
