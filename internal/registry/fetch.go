package registry

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	ctrlog "github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/internal/image"
)

// Fetch streams a layer's compressed bytes from offset (0..layer.Size) to its
// end. The first byte has arrived when it returns. A connection that is cut is
// taken up again where it ended, a few times; what a registry says about not
// coming back too soon is in (*Error).RetryAfter of errors.
//
// Errors are those of the package, without m's reference: the bytes may be for
// others that have asked for the same layer. It ends with io.EOF after exactly
// layer.Size-offset bytes; a registry that has more or fewer is ErrCorrupt. The
// bytes are not hashed. Close may be called while a Read waits, and ends it. External URLs of foreign layers are not followed.
func (c *Client) Fetch(ctx context.Context, m *Manifest, l Layer, cred image.Credential, offset int64) (io.ReadCloser, error) {
	name := "layer " + l.Digest.String()
	if offset < 0 || offset > l.Size {
		return nil, fmt.Errorf("%s: offset %d is outside of its %d bytes", name, offset, l.Size)
	}
	if l.Size == offset {
		return io.NopCloser(bytes.NewReader(nil)), nil
	}
	ref := Reference{Host: m.Host, Repository: m.Repository, Digest: m.Digest}
	rctx, cancel := context.WithCancel(ctrlog.WithLogger(ctx, c.quiet))
	for renew := false; ; renew = true {
		s, fresh, err := c.session(rctx, ref, cred, renew)
		if err != nil {
			cancel()
			return nil, mapError(ctx, name, err)
		}
		var b *blob
		raw := s.each(rctx, docker.HostCapabilityPull, func(_ context.Context, h docker.RegistryHost) (err error) {
			b, err = open(rctx, h, ref, l, offset) // it is read after each has returned
			return err
		})
		if raw == nil {
			b.ctx, b.own, b.cancel, b.name, b.host, b.budget = ctx, rctx, cancel, name, ref.Host, c.cfg.Download
			return b, nil
		}
		err = mapError(ctx, name, raw)
		foreign := errors.Is(raw, context.Canceled) && ctx.Err() == nil
		if fresh || !foreign && !errors.Is(err, blockdev.ErrUnauthorized) {
			cancel()
			c.forget(ref.Host, cred)
			return nil, err
		}
	}
}

func open(ctx context.Context, h docker.RegistryHost, ref Reference, l Layer, offset int64) (*blob, error) {
	f, err := resolver(h).Fetcher(ctx, ref.withDigest(ref.Digest))
	if err != nil {
		return nil, err
	}
	// No URLs: containerd would follow them to anywhere.
	rc, err := f.Fetch(ctx, ocispec.Descriptor{MediaType: l.MediaType, Digest: digest.Digest(l.Digest.String()), Size: l.Size})
	if err != nil {
		return nil, err
	}
	if offset > 0 {
		seeker, ok := rc.(io.Seeker)
		if !ok {
			err = errors.New("the resolver's reader cannot seek")
		} else {
			_, err = seeker.Seek(offset, io.SeekStart)
		}
	}
	// The request is made with the first read.
	br := bufio.NewReaderSize(rc, 16)
	if err == nil {
		_, err = br.Peek(1)
	}
	if err == io.EOF { //nolint:errorlint // a connection that broke gives an error that wraps io.EOF
		err = &Error{Host: h.Host, kind: blockdev.ErrCorrupt, text: fmt.Sprintf("the blob ends at byte %d, its descriptor says %d", offset, l.Size)}
	}
	if err != nil {
		return nil, errors.Join(err, rc.Close())
	}
	return &blob{r: br, rc: rc, left: l.Size - offset, size: l.Size}, nil
}

// blob is a layer's reader: as long as the descriptor says, errors mapped.
type blob struct {
	ctx        context.Context    // the caller's of Fetch; only to name its end as the cause
	own        context.Context    // of the request
	cancel     context.CancelFunc // ends own
	budget     *pace.Pacer
	name, host string
	size       int64

	// mu keeps Close from what Read uses. It is held while Read waits for the
	// registry, which Close ends first.
	mu     sync.Mutex
	r      *bufio.Reader
	rc     io.Closer
	left   int64
	closed bool
}

// Read implements io.Reader.
func (b *blob) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, fmt.Errorf("%s: %w", b.name, fs.ErrClosed)
	}
	if b.left == 0 {
		if _, err := b.r.Peek(1); err == nil {
			return 0, b.wrong("the blob is longer than the %d bytes its descriptor says", b.size)
		}
		return 0, io.EOF
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.r.Read(p)
	b.left -= int64(n)
	switch {
	case err == io.EOF && b.left > 0:
		return n, b.wrong("the blob ends %d bytes before the end that its descriptor says", b.left)
	case err == io.EOF:
		return n, io.EOF
	case err != nil:
		return n, mapError(b.ctx, b.name, err)
	}
	// The bytes are here: a wait holds back those after them, and their sender.
	if err := b.budget.Take(b.own, b.host, blockdev.Demand, int64(n)); err != nil {
		return n, mapError(b.ctx, b.name, err)
	}
	return n, nil
}

// Close implements io.Closer.
func (b *blob) Close() error {
	b.cancel()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil
	}
	b.closed = true
	return b.rc.Close()
}

func (b *blob) wrong(format string, args ...any) error {
	return &Error{Ref: b.name, Host: b.host, kind: blockdev.ErrCorrupt, text: fmt.Sprintf(format, args...)}
}
