package mirror

import (
	"context"
	"encoding/json"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// maxListed is how many manifests of one image index a right is noted for.
const maxListed = 32

// showListed tells the opener of the manifests for this machine that an image index
// lists. A pull that has everything but the unpacked layers asks for no more than
// what a tag names now, by HEAD, and then for layers of one of these. No such
// manifest counts as given out by it: what the credential opens the supernode asks the
// registry. A failure makes the pull an unpacked one, as for other images that cannot be opened.
func (m *Mirror) showListed(ctx context.Context, host string, t target, cred image.Credential) {
	doc, cred, err := m.ask(ctx, host, t, false, cred)
	if err != nil {
		m.log.Debug("cannot read an image index", "image", t.ref(), "error", err)
		return
	}
	m.known.note(t, doc)
	var index struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if json.Unmarshal(doc.Data, &index) != nil {
		return
	}
	mine, shown := platforms.Default(), 0
	for _, d := range index.Manifests {
		id, err := blockdev.ParseDigest(d.Digest.String())
		if err != nil || d.Platform != nil && !mine.Match(*d.Platform) {
			continue
		}
		m.cfg.Opener.Show(t.name, id, cred)
		if shown++; shown == maxListed {
			return
		}
	}
}
