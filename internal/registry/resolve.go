package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/turns"
	"github.com/shoalfs/shoal/internal/image"
)

// Check asks the registry whether the credential may pull from ref's repository,
// by looking for the manifest (or, if that is zero, for ref's tag or digest)
// there. nil means yes. It is never answered from a cache.
//
// Only hosts with the capability "resolve" are asked: containerd's documentation
// keeps that for hosts that are trusted to speak for the registry.
func (c *Client) Check(ctx context.Context, ref string, manifest blockdev.Digest, cred image.Credential) error {
	r, err := ParseReference(ref)
	if err != nil {
		return err
	}
	if manifest == (blockdev.Digest{}) {
		manifest = r.Digest
	}
	d, err := c.head(ctx, r, ref, manifest, cred)
	if err == nil && manifest == (blockdev.Digest{}) {
		c.keepTag(r, ref, d) // so nobody has to ask the same again
	}
	return err
}

// keepTag writes down what a tag names now.
func (c *Client) keepTag(r Reference, name string, d blockdev.Digest) {
	if err := c.cache.putTag(r, d); err != nil {
		c.log.Warn("cannot cache the manifest that a tag names", "image", name, "error", err)
	}
}

// head looks for a manifest by digest, or by r's tag if d is zero.
func (c *Client) head(ctx context.Context, r Reference, name string, d blockdev.Digest, cred image.Credential) (blockdev.Digest, error) {
	err := c.do(ctx, r, name, cred, func(ctx context.Context, s *session) (err error) {
		if d == (blockdev.Digest{}) {
			d, err = s.tag(ctx, r)
			return err
		}
		err = s.head(ctx, r, "manifests", d)
		if e := mapError(ctx, "", err); err == nil || ctx.Err() != nil || Outage(e) || Limited(e) {
			return err
		}
		// Among the blobs there are configs, and, as containerd has it, manifests.
		if berr := s.head(ctx, r, "blobs", d); berr == nil || errors.Is(mapError(ctx, "", err), blockdev.ErrNotFound) {
			return berr
		}
		return err
	})
	return d, err
}

// tag asks what r's tag names.
func (s *session) tag(ctx context.Context, r Reference) (d blockdev.Digest, _ error) {
	err := s.each(ctx, docker.HostCapabilityPull|docker.HostCapabilityResolve, func(ctx context.Context, h docker.RegistryHost) error {
		_, desc, err := resolver(h).Resolve(ctx, r.Name()+":"+r.Tag)
		if err != nil {
			return err
		}
		if d, err = blockdev.ParseDigest(desc.Digest.String()); err != nil {
			return &Error{Host: h.Host, kind: blockdev.ErrUnsupported, text: fmt.Sprintf("names the manifest with digest %.80q", desc.Digest)}
		}
		return nil
	})
	return d, err
}

// Resolve finds out what an image consists of. Manifests and configs that are in
// the cache for this repository are not asked for again, and a tag only after
// Config.TagTTL, so an answer does not mean that the registry lets the credential
// in: that is what Check is for. While the registry is unavailable, the last
// known meaning of a tag counts.
func (c *Client) Resolve(ctx context.Context, req image.Request) (*Manifest, error) {
	r, err := ParseReference(req.Ref)
	if err != nil {
		return nil, err
	}
	q := &query{c: c, ref: r, name: req.Ref, cred: req.Credential, want: ociPlatform(req.Platform)}
	if req.Platform.OS == "" && req.Platform.Architecture == "" {
		q.want = platforms.DefaultSpec()
	}
	d := req.Manifest
	if d == (blockdev.Digest{}) {
		d = r.Digest
	}
	var m *Manifest
	err = q.follow(ctx, d, func(d blockdev.Digest) (err error) {
		m, err = q.image(ctx, d, 0, false)
		return err
	})
	return m, err
}

// follow calls use with d, or if that is zero, with what the tag names. Where
// that is known from the cache and the registry does not have it, the tag is
// asked for again: it may have been moved and the old image deleted, or the file
// may be damaged.
func (q *query) follow(ctx context.Context, d blockdev.Digest, use func(blockdev.Digest) error) error {
	if d != (blockdev.Digest{}) {
		return q.wrap(use(d))
	}
	d, kept, err := q.tag(ctx)
	if err != nil {
		return q.wrap(err)
	}
	err = use(d)
	if kept && errors.Is(err, blockdev.ErrNotFound) {
		if now, aerr := q.askTag(ctx); aerr == nil && now != d {
			err = use(now)
		}
	}
	return q.wrap(err)
}

// query is one Resolve.
type query struct {
	c    *Client
	ref  Reference
	name string
	cred image.Credential
	want ocispec.Platform
	read int // documents
}

// wrap puts the reference in front of errors that do not have it yet.
func (q *query) wrap(err error) error {
	if err == nil || strings.HasPrefix(err.Error(), q.name+": ") {
		return err
	}
	return fmt.Errorf("%s: %w", q.name, err)
}

// key names a question: another credential may get another answer.
func (q *query) key(kind, what string) string {
	return kind + " " + q.ref.Name() + " " + what + " " + CredentialHash(q.cred)
}

// tag says what the tag names, and whether that is what it named earlier.
func (q *query) tag(ctx context.Context) (d blockdev.Digest, kept bool, _ error) {
	old, at, ok := q.c.cache.tag(q.ref)
	if age := time.Since(at); ok && age >= 0 && age < q.c.cfg.TagTTL {
		return old, true, nil
	}
	if ok {
		if q.c.isDown(q.ref, q.cred) {
			return old, true, nil
		}
		// Nobody is to wait long for a registry that does not answer while there
		// is something to go on with.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, min(q.c.cfg.Timeout, 5*time.Second), errSlow)
		defer cancel()
	}
	d, err := q.askTag(ctx)
	if ok && errors.Is(err, blockdev.ErrUnavailable) {
		q.c.setDown(q.ref, q.cred, err)
		if others, say := q.c.said.Say("down", q.ref.Host, time.Now()); say {
			q.c.log.Warn("registry unavailable; using the manifest that the tag named last", "image", q.name, "manifest", old, "since", at, "error", err, "others", others)
		}
		return old, true, nil
	}
	return d, false, err
}

// askTag asks the registry what the tag names, and keeps the answer. The error does
// not name the image: others that ask call it by another name.
func (q *query) askTag(ctx context.Context) (blockdev.Digest, error) {
	f, err := q.c.ask(ctx, q.key("tag", q.ref.Tag), func(ctx context.Context, f *question) (err error) {
		if f.digest, err = q.c.head(ctx, q.ref, "", blockdev.Digest{}, q.cred); err == nil {
			q.c.keepTag(q.ref, q.name, f.digest)
		}
		return err
	})
	if err != nil {
		return blockdev.Digest{}, err
	}
	return f.digest, nil
}

// maxDepth is how deep image indexes may be nested.
const maxDepth = 4

var errOtherPlatform = errors.New("the image is for another platform")

// image reads the manifest d, following image indexes. With check, the config
// must be for the wanted platform, else errOtherPlatform.
func (q *query) image(ctx context.Context, d blockdev.Digest, depth int, check bool) (*Manifest, error) {
	b, err := q.document(ctx, ocispec.MediaTypeImageManifest, descriptor{digest: d, size: -1}, maxManifest)
	if err != nil {
		return nil, err
	}
	doc, err := parseDocument(b)
	if err != nil {
		return nil, err
	}
	if doc.Config == nil {
		return q.index(ctx, doc, depth, check)
	}
	config, layers, err := imageParts(doc)
	if err != nil {
		return nil, err
	}
	b, err = q.document(ctx, config.mediaType, config, maxConfig)
	if err != nil {
		return nil, err
	}
	ls, cfg, err := parseConfig(b, layers)
	if err != nil {
		return nil, err
	}
	if check && !platforms.Only(q.want).Match(platforms.Normalize(ocispec.Platform{OS: cfg.OS, Architecture: cfg.Architecture, Variant: cfg.Variant})) {
		return nil, errOtherPlatform
	}
	return &Manifest{Ref: q.name, Host: q.ref.Host, Repository: q.ref.Repository, Digest: d, Layers: ls}, nil
}

func (q *query) index(ctx context.Context, doc *document, depth int, check bool) (*Manifest, error) {
	if depth >= maxDepth {
		return nil, unsupported("image indexes are nested more than %d deep", maxDepth)
	}
	match, guess := choose(doc, q.want)
	if len(match) > 0 {
		match, guess = match[:1], nil // as containerd does: the best one, or an error
	}
	for i, desc := range append(match, guess...) {
		entry, err := checkDescriptor(fmt.Sprintf("entry %d of the image index", i), desc, maxManifest)
		if err != nil {
			return nil, err
		}
		m, err := q.image(ctx, entry.digest, depth+1, check || desc.Platform == nil)
		if errors.Is(err, errOtherPlatform) {
			continue
		}
		return m, err
	}
	if depth > 0 && check {
		return nil, errOtherPlatform
	}
	return nil, fmt.Errorf("the image has no manifest for platform %s: %w", platforms.Format(q.want), blockdev.ErrNotFound)
}

// maxDocuments bounds what one query reads. An index's entries with a platform need
// a few; without one, each entry is an image or an index that has to be looked at.
const maxDocuments = 32

// document returns a manifest or config from the cache or the registry, hashed.
func (q *query) document(ctx context.Context, mediaType string, d descriptor, limit int64) ([]byte, error) {
	if q.read++; q.read > maxDocuments {
		return nil, unsupported("its image indexes do not say which of their entries are for platform %s, and it is not among the first %d manifests and configs",
			platforms.Format(q.want), maxDocuments)
	}
	if b, ok := q.c.cache.doc(q.ref.Name(), d.digest, limit); ok {
		return b, nil
	}
	f, err := q.c.ask(ctx, q.key("document", d.digest.String()), func(ctx context.Context, f *question) (err error) {
		var ok bool
		if f.data, ok = q.c.cache.doc(q.ref.Name(), d.digest, limit); !ok { // since this caller looked
			f.data, err = q.fetch(ctx, mediaType, d, limit)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return f.data, nil
}

// fetch reads a manifest or config from the registry, and keeps it. As for askTag,
// the error does not name the image.
func (q *query) fetch(ctx context.Context, mediaType string, d descriptor, limit int64) ([]byte, error) {
	var b []byte
	err := q.c.do(ctx, q.ref, "", q.cred, func(ctx context.Context, s *session) error {
		return s.each(ctx, docker.HostCapabilityPull, func(ctx context.Context, h docker.RegistryHost) (err error) {
			b, err = q.c.readDocument(ctx, h, q.ref, mediaType, d, limit)
			if errors.Is(err, blockdev.ErrCorrupt) && h.Host != s.hosts[len(s.hosts)-1].Host {
				q.c.log.Warn("a mirror sent wrong content, asking the next host", "image", q.name, "error", mapError(ctx, q.name, err))
			}
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	if err := q.c.cache.putDoc(q.ref.Name(), d.digest, b); err != nil {
		q.c.log.Warn("cannot cache a manifest or config", "image", q.name, "error", err)
	}
	return b, nil
}

func (c *Client) readDocument(ctx context.Context, h docker.RegistryHost, ref Reference, mediaType string, d descriptor, limit int64) ([]byte, error) {
	f, err := resolver(h).Fetcher(ctx, ref.withDigest(d.digest))
	if err != nil {
		return nil, err
	}
	what := "manifest"
	if !images.IsManifestType(mediaType) {
		what = "image config"
	}
	rc, err := f.Fetch(ctx, ocispec.Descriptor{MediaType: mediaType, Digest: digest.Digest(d.digest.String()), Size: d.size})
	if err != nil {
		return nil, err
	}
	body := &counted{Reader: io.LimitReader(rc, limit+1), turns: c.reading, host: h.Host}
	defer body.give()
	b, err := io.ReadAll(body)
	if cerr := rc.Close(); err == nil {
		err = cerr
	}
	right := blockdev.Sum(b) == d.digest
	switch {
	case err != nil && !right: // else all has come, and the Content-Length is wrong
		return nil, fmt.Errorf("registry %s: %s %s: %w", h.Host, what, d.digest, err)
	case int64(len(b)) > limit:
		return nil, &Error{Host: h.Host, kind: blockdev.ErrUnsupported, text: fmt.Sprintf("%s %s is larger than %d bytes", what, d.digest, limit)}
	case !right:
		return nil, &Error{Host: h.Host, kind: blockdev.ErrCorrupt, text: fmt.Sprintf("%s %s: the %d bytes sent have another digest", what, d.digest, len(b))}
	case d.size >= 0 && int64(len(b)) != d.size:
		return nil, &Error{Host: h.Host, kind: blockdev.ErrCorrupt, text: fmt.Sprintf("%s %s has %d bytes, its descriptor says %d", what, d.digest, len(b), d.size)}
	}
	return b, nil
}

// countedStep is how many bytes of Config.DocumentBytes are taken at once.
const countedStep = 32 << 10

// counted is a document that is read, whose bytes count against Config.DocumentBytes from when
// they come. A registry that sends all but the end of many holds no more than its share.
type counted struct {
	io.Reader
	turns       *turns.Turns
	host        string
	taken, read int64
}

func (r *counted) Read(p []byte) (int, error) {
	if r.read == r.taken {
		if !r.turns.Try(blockdev.Sum([]byte(r.host)), countedStep) {
			return 0, &Error{Host: r.host, answered: true, kind: blockdev.ErrUnavailable, text: "too many bytes of its manifests and configs are read at the same time"}
		}
		r.taken += countedStep
	}
	n, err := r.Reader.Read(p[:min(int64(len(p)), r.taken-r.read)])
	r.read += int64(n)
	return n, err
}

func (r *counted) give() {
	r.turns.Give(blockdev.Sum([]byte(r.host)), r.taken)
}
