package uplink

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/route"
)

// The daemons give an Uplink clients.
var _ Supernode = (*exchange.Client)(nil)

// fake is a supernode that has some chunks.
type fake struct {
	away error
	gone time.Duration
	// hangs, if not nil, is told of each request, which then gets no answer until the
	// channel that it returns is closed; nil: an answer at once.
	hangs func() <-chan struct{}
	// alive is how often a request that hangs gives a sign of life; 0: never.
	alive  time.Duration
	chunks map[blockdev.Digest]bool
	image  error
	mu     sync.Mutex
	asked  int
	wanted atomic.Int64 // chunks, of the last Fetch
	told   []blockdev.DiffProfile
}

func (f *fake) Status() error { return f.away }
func (f *fake) Close() error  { return nil }

func (f *fake) Gone() time.Duration { return f.gone }

// begin counts a request and waits for as long as it is to hang.
func (f *fake) begin(ctx context.Context, alive func()) error {
	f.mu.Lock()
	f.asked++
	hangs := f.hangs
	f.mu.Unlock()
	if hangs == nil {
		return nil
	}
	until := hangs()
	for until != nil {
		var sign <-chan time.Time
		if f.alive > 0 {
			sign = time.After(f.alive)
		}
		select {
		case <-until:
			return nil
		case <-sign:
			alive()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (f *fake) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	if err := f.begin(ctx, req.Alive); err != nil {
		return nil, err
	}
	if err := errors.Join(f.away, f.image); err != nil {
		return nil, err
	}
	return &image.Image{Layers: []image.Layer{{DiffID: layerDiff}}}, nil
}

func (f *fake) ReportProfiles(_ context.Context, list []blockdev.DiffProfile) error {
	f.told = append(f.told, list...)
	return nil
}

func (f *fake) Document(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
	if err := f.begin(ctx, req.Alive); err != nil {
		return nil, err
	}
	return &image.Document{}, f.image
}

func (f *fake) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	f.wanted.Store(int64(len(req.Chunks)))
	if err := f.begin(ctx, func() {}); err != nil {
		return err
	}
	if f.away != nil {
		return f.away
	}
	var missing error
	for i, c := range req.Chunks {
		if !f.chunks[c.Digest] {
			missing = blockdev.ErrNotFound
			continue
		}
		if err := deliver(i, content[c.Digest]); err != nil {
			return err
		}
	}
	return missing
}

var (
	errGone = fmt.Errorf("gone: %w", blockdev.ErrUnavailable)
	// layerDiff is that of the one layer of a fake's image.
	layerDiff = blockdev.Sum([]byte("diff"))

	key = blockdev.Sum([]byte("key"))
)

// newUplink returns an Uplink to n supernodes, and these in the order of key.
func newUplink(t *testing.T, n int) (*Uplink, []*fake) {
	t.Helper()
	nodes := map[peer.ID]Supernode{}
	var ids []peer.ID
	for i := range n {
		id := peer.ID(fmt.Sprint("super", i))
		ids = append(ids, id)
		nodes[id] = &fake{chunks: map[blockdev.Digest]bool{}}
	}
	u, err := New(nodes)
	if err != nil {
		t.Fatal(err)
	}
	var fakes []*fake
	for _, id := range route.Order(key, ids) {
		fakes = append(fakes, nodes[id].(*fake))
	}
	return u, fakes
}

// content is what chunks are made of.
var content = map[blockdev.Digest][]byte{}

func init() {
	for i := range 256 {
		content[blockdev.Sum([]byte{byte(i)})] = []byte{byte(i)}
	}
}

func chunks(n int) (list []blockdev.Chunk) {
	for i := range n {
		list = append(list, blockdev.Chunk{Length: 1, Digest: blockdev.Sum([]byte{byte(i)})})
	}
	return list
}

// fetch gets all chunks and returns how often each was delivered.
func fetchAll(t *testing.T, u *Uplink, list []blockdev.Chunk) ([]int, error) {
	t.Helper()
	got := make([]int, len(list))
	err := u.Fetch(t.Context(), blockdev.Request{Diff: key, Chunks: list}, func(i int, data []byte) error {
		if blockdev.Sum(data) != list[i].Digest {
			t.Errorf("chunk %d comes with the bytes of another", i)
		}
		got[i]++
		return nil
	})
	return got, err
}

// stored is a fake that has its chunks in memory.
type stored struct {
	*fake
	mem blockdevtest.Memory
}

func (s *stored) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	return s.mem.Fetch(ctx, req, deliver)
}

// TestSource runs the conformance suite of blockdev.Source: each supernode has its part
// of the chunks, or all have all.
func TestSource(t *testing.T) {
	for name, has := range map[string]func(super, chunk int) bool{
		"all have all":      func(int, int) bool { return true },
		"each has its part": func(super, chunk int) bool { return chunk%3 == super },
	} {
		t.Run(name, func(t *testing.T) {
			blockdevtest.TestSource(t, func(t *testing.T, data [][]byte) blockdev.Source {
				supers := map[peer.ID]Supernode{}
				for i := range 3 {
					s := &stored{fake: &fake{}}
					for k, b := range data {
						if has(i, k) {
							s.mem.Put(b)
						}
					}
					supers[peer.ID(fmt.Sprint("super", i))] = s
				}
				u, err := New(supers)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = u.Close() })
				return u
			})
		})
	}
}

func TestFetch(t *testing.T) {
	list := chunks(10)
	u, s := newUplink(t, 3)
	for i, c := range list {
		s[0].chunks[c.Digest] = i%2 == 0
		s[2].chunks[c.Digest] = true
	}
	got, err := fetchAll(t, u, list)
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range got {
		if n != 1 {
			t.Errorf("chunk %d was delivered %d times", i, n)
		}
	}
	if s[0].asked != 1 || s[1].asked != 1 || s[2].asked != 1 {
		t.Errorf("asked %d, %d, %d times", s[0].asked, s[1].asked, s[2].asked)
	}
	// The owner is away: the next one first, and the owner not at all.
	s[0].away = errGone
	for _, c := range list {
		s[1].chunks[c.Digest] = true
	}
	if _, err := fetchAll(t, u, list); err != nil || s[0].asked != 1 || s[1].asked != 2 {
		t.Errorf("%v, asked %d and %d times", err, s[0].asked, s[1].asked)
	}
	// Nobody has it.
	for _, f := range s {
		f.away, f.chunks = nil, nil
	}
	if _, err := fetchAll(t, u, list); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("nobody has it: %v", err)
	}
}

// An error of the taker ends the request, whatever it wraps.
func TestDeliverFails(t *testing.T) {
	u, s := newUplink(t, 2)
	list := chunks(2)
	for _, f := range s {
		f.chunks = map[blockdev.Digest]bool{list[0].Digest: true, list[1].Digest: true}
	}
	full := fmt.Errorf("disk: %w", blockdev.ErrUnavailable)
	calls := 0
	err := u.Fetch(t.Context(), blockdev.Request{Diff: key, Chunks: list}, func(int, []byte) error {
		calls++
		return full
	})
	if !errors.Is(err, full) || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
}

func TestFetchIndexes(t *testing.T) {
	u, s := newUplink(t, 2)
	req := image.Request{Manifest: key}
	s[0].image = errGone
	if _, err := u.FetchIndexes(t.Context(), req); err != nil || s[1].asked != 1 {
		t.Errorf("%v, the second was asked %d times", err, s[1].asked)
	}
	// Who has given out the image is told what was read of it.
	if err := u.ReportProfiles(t.Context(), []blockdev.DiffProfile{{Diff: layerDiff}}); err != nil || len(s[0].told) != 0 || len(s[1].told) != 1 {
		t.Errorf("%v, told %d and %d", err, len(s[0].told), len(s[1].told))
	}
	s[0].image = fmt.Errorf("no: %w", blockdev.ErrUnauthorized)
	if _, err := u.FetchIndexes(t.Context(), req); !errors.Is(err, blockdev.ErrUnauthorized) || s[1].asked != 1 {
		t.Errorf("%v, the second was asked %d times: a no is final", err, s[1].asked)
	}
}
