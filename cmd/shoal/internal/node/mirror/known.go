package mirror

import (
	"encoding/json"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/lru"
)

// maxKnown bounds each of known's maps.
const maxKnown = 4096

// blobKey is a document of a repository.
type blobKey struct {
	name   string
	digest blockdev.Digest
}

// known is what the documents given out so far have said: which tag a manifest had,
// and which blobs are the configs of which manifests. Everything else is a layer.
type known struct {
	mu      sync.Mutex
	tags    *lru.Map[blobKey, string]
	configs *lru.Map[blobKey, blockdev.Digest] // -> manifest
}

func newKnown() *known {
	return &known{tags: lru.New[blobKey, string](maxKnown), configs: lru.New[blobKey, blockdev.Digest](maxKnown)}
}

// maxLayers bounds how many layers of a manifest the opener learns. An image that has more
// is not lazy.
const maxLayers = 512

// note takes in a document that a pull was given. manifest reports whether it is the
// manifest of an image, which has these layers, or of an artifact, which the opener
// finds out.
func (k *known) note(t target, doc *image.Document) (layers []blockdev.Digest, manifest bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	id := blobKey{t.name, doc.Digest}
	if t.tag != "" {
		k.tags.Add(id, t.tag)
	}
	var m struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if doc.Data == nil || json.Unmarshal(doc.Data, &m) != nil {
		return nil, false
	}
	if tag, ok := k.tags.Get(id); ok && len(m.Manifests) <= 256 {
		for _, d := range m.Manifests {
			if child, err := blockdev.ParseDigest(d.Digest.String()); err == nil {
				k.tags.Add(blobKey{t.name, child}, tag)
			}
		}
	}
	if m.Config == nil {
		return nil, false
	}
	config, err := blockdev.ParseDigest(m.Config.Digest.String())
	if err != nil {
		return nil, false
	}
	k.configs.Add(blobKey{t.name, config}, doc.Digest)
	for _, d := range m.Layers[:min(len(m.Layers), maxLayers)] {
		if layer, err := blockdev.ParseDigest(d.Digest.String()); err == nil {
			layers = append(layers, layer)
		}
	}
	return layers, true
}

// config returns the manifest whose config a blob is.
func (k *known) config(t target) (manifest blockdev.Digest, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.configs.Get(blobKey{t.name, t.digest})
}

// tag is the last one by which a manifest was asked for; empty: by none.
func (k *known) tag(name string, manifest blockdev.Digest) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	tag, _ := k.tags.Get(blobKey{name, manifest})
	return tag
}

const (
	// patience is how long a request waits for the source's answer, and impatience
	// how long it does after one has waited for nothing: what the source has at hand
	// comes within that. A pull asks three or four times, so together they are less
	// than a second.
	patience   = 700 * time.Millisecond
	impatience = 80 * time.Millisecond
	// lateFor is for how long a late answer makes impatient.
	lateFor = 10 * time.Second
	// maxLate is how many questions about a late registry are under way at a time.
	maxLate = 8
)

// health knows for which registries the source was late: since it does not answer
// itself, or the registry, or its token server does not.
type health struct {
	patience, impatience time.Duration

	mu sync.Mutex
	m  map[string]*lateness
}

type lateness struct {
	until   time.Time
	waiting int // questions under way
}

// begin returns how long to wait for an answer about a registry; false: not at all.
func (h *health) begin(host string, now time.Time) (time.Duration, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.m[host]
	if l == nil {
		if h.m == nil {
			h.m = map[string]*lateness{}
		}
		l = &lateness{}
		h.m[host] = l
	}
	wait := h.patience
	if now.Before(l.until) {
		if l.waiting >= maxLate {
			return 0, false
		}
		wait = h.impatience
	}
	l.waiting++
	return wait, true
}

// late notes that one has waited for nothing. It reports whether that is news.
func (h *health) late(host string, now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.m[host]
	if l == nil {
		return false
	}
	news := !now.Before(l.until)
	l.until = now.Add(lateFor)
	return news
}

// end notes that a question is over, and whether the source answered it in time.
func (h *health) end(host string, inTime bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.m[host]
	if l == nil {
		return
	}
	l.waiting--
	if inTime {
		l.until = time.Time{}
	}
	if l.waiting == 0 && l.until.IsZero() {
		delete(h.m, host)
	}
}
