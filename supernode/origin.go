package supernode

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/store"
)

// Digests are no secret, so anybody can list anybody's layers in a manifest, and
// registries need not look for what it lists (for foreign layers they must not). So
// a stored layer is handed out on the word of those repositories alone that have
// shown that they have it: the layer was fetched from there, or a request for the
// blob was answered well. What a host says so counts if its bytes were seen: the
// layer was fetched from that host once, from whichever repository, and hashed.
//
// An origin in the store is "host/repository", or only "host": that one has sent
// all bytes, and it is not known for which repository.

func originOf(m *registry.Manifest) string { return m.Host + "/" + m.Repository }

func provenFor(rec store.LayerRecord, m *registry.Manifest) bool {
	return slices.Contains(rec.Origins, originOf(m))
}

// believed says whether the host's word is enough for a layer.
func (s *Supernode) believed(rec store.LayerRecord, host string) bool {
	return s.trusted[host] || slices.ContainsFunc(rec.Origins, func(o string) bool {
		return o == host || strings.HasPrefix(o, host+"/")
	})
}

// key names all that somebody wants of a layer: what one has been refused says
// nothing about another.
func (r wanted) key() string {
	return fmt.Sprint(originOf(r.m), " ", r.l.Digest, " ", r.l.DiffID, " ", r.l.Size, " ", r.l.MediaType)
}

// prove has the image's registry show that the repository has a layer that is
// stored, and that this credential may have it.
func (s *Supernode) prove(ctx context.Context, r wanted, open ingest.Open) error {
	key := "prove " + r.key()
	if err := s.failed.recall(key); err != nil {
		return err
	}
	return s.once(ctx, key+" "+registry.CredentialHash(r.cred), atLeast(r.l.Size), r.watch, func(ctx context.Context, p *progress) error {
		err := s.show(ctx, r, open, p)
		if err != nil && ctx.Err() == nil && !errors.Is(err, errGone) {
			s.log.Warn("a layer is stored, but the image's registry does not show that this repository has it; nodes do not get the layer for this image",
				"image", r.m.Ref, "layer", r.l.Digest, "error", err)
			s.failed.note(key, err)
		}
		return err
	})
}

// atLeast is for work with that many bytes, which have to come at restoreRate if
// nobody waits.
func atLeast(size int64) flight.Policy { return flight.Policy{Least: timeFor(size)} }

// timeFor is how long that many bytes may take.
func timeFor(size int64) time.Duration {
	return restoreTime + time.Duration(size/restoreRate)*time.Second
}

func (s *Supernode) show(ctx context.Context, r wanted, open ingest.Open, p *progress) error {
	rec, err := s.store.Layer(r.l.Digest)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", errGone, blockdev.ErrUnavailable)
	case !s.believed(rec, r.m.Host):
		err = s.verify(ctx, r, open, p)
	default:
		err = s.reg.HasBlob(ctx, r.m, r.l, r.cred)
		if r.public && r.cred != (blockdev.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
			err = s.reg.HasBlob(ctx, r.m, r.l, blockdev.Credential{})
		}
		if registry.Downgraded(err) {
			// Only the bytes themselves are proof, from each sender.
			err = s.verify(ctx, r, open, p)
		}
	}
	if err != nil {
		return err
	}
	if err := s.store.AddOrigin(r.l.Digest, originOf(r.m)); errors.Is(err, blockdev.ErrNotFound) {
		return fmt.Errorf("%w: %w", errGone, blockdev.ErrUnavailable)
	} else if err != nil {
		return err
	}
	return nil
}

// verify fetches and hashes a layer that is stored already, only to see that a
// registry that has not sent it yet really has it.
func (s *Supernode) verify(ctx context.Context, r wanted, open ingest.Open, p *progress) error {
	release, err := s.verifying.Take(ctx, r.m.Host)
	if err != nil {
		return err
	}
	defer release()
	if rec, err := s.store.Layer(r.l.Digest); err == nil && provenFor(rec, r.m) {
		return nil // shown by others since
	}
	rc, err := open(ctx, 0)
	if err != nil {
		return err
	}
	h := &counted{Hash: sha256.New(), to: p, p: blockdev.Progress{Layer: r.l.Digest, Total: r.l.Size, Stage: blockdev.StageVerifying}}
	_, err = io.Copy(h, rc)
	if cerr := rc.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if d := blockdev.Digest(h.Sum(nil)); d != r.l.Digest {
		return fmt.Errorf("registry %s sends %s instead: %w", r.m.Host, d, blockdev.ErrCorrupt)
	}
	return nil
}

// counted is a hash that reports how far it is.
type counted struct {
	hash.Hash
	to   *progress
	p    blockdev.Progress
	last int64
}

// reportStep is after how many bytes progress is reported again.
const reportStep = 1 << 20

// Write implements io.Writer.
func (c *counted) Write(b []byte) (int, error) {
	c.p.Done += int64(len(b))
	if c.p.Done-c.last >= reportStep || c.last == 0 {
		c.last = c.p.Done
		c.to.Report(c.p)
	}
	return c.Hash.Write(b)
}
