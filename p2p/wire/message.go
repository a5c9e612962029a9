package wire

import (
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

const digestLen = len(blockdev.Digest{})

// ParseChunkRequest reads and checks a ChunkRequest. Errors wrap
// blockdev.ErrCorrupt.
func ParseChunkRequest(b []byte) (*ChunkRequest, error) {
	m := &ChunkRequest{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, corrupt("chunk request", err)
	}
	if len(m.Diff) != digestLen {
		return nil, corrupt("chunk request", fmt.Errorf("DiffID of %d bytes, not %d", len(m.Diff), digestLen))
	}
	if n := len(m.Digests); n == 0 || n%digestLen != 0 || n > MaxDigests*digestLen {
		return nil, corrupt("chunk request", fmt.Errorf("%d bytes of digests, not 1 to %d times %d", n, MaxDigests, digestLen))
	}
	if n := len(m.Group); n != 0 && n != digestLen {
		return nil, corrupt("chunk request", fmt.Errorf("group of %d bytes, not %d", n, digestLen))
	}
	if m.Hops > MaxHops {
		return nil, corrupt("chunk request", fmt.Errorf("forwarded %d times, at most %d are possible", m.Hops, MaxHops))
	}
	return m, nil
}

// Count returns how many chunks x asks for.
func (x *ChunkRequest) Count() int { return len(x.GetDigests()) / digestLen }

// Digest returns the i-th digest of x, 0 <= i < Count.
func (x *ChunkRequest) Digest(i int) blockdev.Digest {
	return blockdev.Digest(x.GetDigests()[i*digestLen : (i+1)*digestLen])
}

// NewImageRequest puts req into a message. An error names what is too long.
func NewImageRequest(req *image.Request) (*ImageRequest, error) {
	m := &ImageRequest{
		Ref: req.Ref,
		Platform: &Platform{
			Os:           req.Platform.OS,
			Architecture: req.Platform.Architecture,
			Variant:      req.Platform.Variant,
		},
		Credential: &Credential{Username: req.Credential.Username, Secret: req.Credential.Secret},
	}
	if req.Manifest != (blockdev.Digest{}) {
		m.Manifest = req.Manifest[:]
	}
	m.Progress = req.Progress != nil
	for _, d := range req.Have {
		m.Have = append(m.Have, d[:]...)
	}
	for _, d := range req.Only {
		m.Only = append(m.Only, d[:]...)
	}
	m.Stored, m.Relay = req.Stored, req.Relay
	if err := checkImageRequest(m); err != nil {
		return nil, err
	}
	return m, nil
}

// ParseImageRequest reads and checks an ImageRequest, and says whether the client
// wants to hear of progress. Errors wrap blockdev.ErrCorrupt; they never hold the
// credential.
func ParseImageRequest(b []byte) (_ *image.Request, progress bool, _ error) {
	m := &ImageRequest{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, false, corrupt("index request", err)
	}
	if err := checkImageRequest(m); err != nil {
		return nil, false, corrupt("index request", err)
	}
	p, c := m.GetPlatform(), m.GetCredential()
	req := &image.Request{
		Ref: m.Ref,
		Platform: image.Platform{
			OS:           p.GetOs(),
			Architecture: p.GetArchitecture(),
			Variant:      p.GetVariant(),
		},
		Credential: image.Credential{Username: c.GetUsername(), Secret: c.GetSecret()},
	}
	if len(m.Manifest) > 0 {
		req.Manifest = blockdev.Digest(m.Manifest)
	}
	for d := range Keys(m.Have) {
		req.Have = append(req.Have, d)
	}
	for d := range Keys(m.Only) {
		req.Only = append(req.Only, d)
	}
	req.Stored, req.Relay = m.Stored, m.Relay
	return req, m.Progress, nil
}

func checkImageRequest(m *ImageRequest) error {
	p, c := m.GetPlatform(), m.GetCredential()
	switch {
	case m.Ref == "":
		return fmt.Errorf("empty image reference")
	case len(m.Ref) > MaxRef:
		return fmt.Errorf("image reference of %d bytes, at most %d are allowed", len(m.Ref), MaxRef)
	case len(m.Manifest) != 0 && len(m.Manifest) != digestLen:
		return fmt.Errorf("manifest digest of %d bytes, not %d", len(m.Manifest), digestLen)
	case len(p.GetOs()) > MaxPlatform || len(p.GetArchitecture()) > MaxPlatform || len(p.GetVariant()) > MaxPlatform:
		return fmt.Errorf("platform with a field of more than %d bytes", MaxPlatform)
	case len(c.GetUsername()) > MaxCredential || len(c.GetSecret()) > MaxCredential:
		return fmt.Errorf("credential with a field of more than %d bytes", MaxCredential)
	case len(m.Have)%digestLen != 0 || len(m.Have) > MaxHave*digestLen:
		return fmt.Errorf("%d bytes of known layers, not 0 to %d times %d", len(m.Have), MaxHave, digestLen)
	case len(m.Only)%digestLen != 0 || len(m.Only) > MaxHave*digestLen:
		return fmt.Errorf("%d bytes of wanted layers, not 0 to %d times %d", len(m.Only), MaxHave, digestLen)
	}
	return nil
}

// ParseImageFrame reads and checks an ImageFrame: a header's digests and counts,
// that data is 1 to MaxIndexData bytes. A part that this version does not know
// gives a frame without part, to be skipped. Errors wrap blockdev.ErrCorrupt.
func ParseImageFrame(b []byte) (*ImageFrame, error) {
	m := &ImageFrame{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, corrupt("index frame", err)
	}
	switch p := m.Part.(type) {
	case *ImageFrame_Header:
		if err := checkHeader(p.Header); err != nil {
			return nil, corrupt("index frame", err)
		}
	case *ImageFrame_Data:
		if n := len(p.Data.GetData()); n == 0 || n > MaxIndexData {
			return nil, corrupt("index frame", fmt.Errorf("%d bytes of data, not 1 to %d", n, MaxIndexData))
		}
	case *ImageFrame_Working:
		if err := checkWorking(p.Working); err != nil {
			return nil, corrupt("index frame", err)
		}
	}
	return m, nil
}

func checkHeader(h *ImageHeader) error {
	if len(h.GetManifest()) != digestLen {
		return fmt.Errorf("manifest digest of %d bytes, not %d", len(h.GetManifest()), digestLen)
	}
	if n := len(h.GetLayers()); n > MaxLayers {
		return fmt.Errorf("%d layers, at most %d are allowed", n, MaxLayers)
	}
	if n := len(h.GetGrant()); n > MaxGrant {
		return fmt.Errorf("grant of %d bytes, at most %d are allowed", n, MaxGrant)
	}
	if err := checkRelays(h.GetRelays()); err != nil {
		return err
	}
	for i, l := range h.GetLayers() {
		switch n := len(l.GetIndexDigest()); {
		case n != 0 && n != digestLen:
			return fmt.Errorf("layer %d: digest of the index with %d bytes, not %d", i, n, digestLen)
		case n != 0 && (l.GetIndexLength() == 0 || len(h.GetRelays()) == 0):
			return fmt.Errorf("layer %d: an index of %d bytes, and %d nodes instead of it", i, l.GetIndexLength(), len(h.GetRelays()))
		case len(l.GetDigest()) != digestLen || len(l.GetDiffId()) != digestLen:
			return fmt.Errorf("layer %d: digests of %d and %d bytes, not %d", i, len(l.GetDigest()), len(l.GetDiffId()), digestLen)
		case l.GetSize() < 0 || l.GetIndexLength() < 0:
			return fmt.Errorf("layer %d: size %d, index length %d", i, l.GetSize(), l.GetIndexLength())
		}
	}
	return nil
}
