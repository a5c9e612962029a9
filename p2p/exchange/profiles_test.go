package exchange

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// profileSink takes reports, but for diffs that it refuses.
type profileSink struct {
	mu      sync.Mutex
	peers   []string
	got     []blockdev.DiffProfile
	refuses blockdev.Digest
	hook    func()
}

func (s *profileSink) ReportProfileFrom(_ context.Context, peer string, p blockdev.DiffProfile) error {
	if s.hook != nil {
		s.hook()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.Diff == s.refuses {
		return fmt.Errorf("not yours: %w", blockdev.ErrUnauthorized)
	}
	s.peers = append(s.peers, peer)
	s.got = append(s.got, p)
	return nil
}

func testProfiles(names ...string) (list []blockdev.DiffProfile) {
	for i, name := range names {
		list = append(list, blockdev.DiffProfile{
			Diff:    blockdev.Sum([]byte(name)),
			Profile: blockdev.Profile{{Chunk: uint32(i), Rank: uint32(i)}, {Chunk: 1000, Rank: 7}},
		})
	}
	return list
}

func TestReportProfiles(t *testing.T) {
	h := newHost(t, nil, loopback)
	list := testProfiles("a", "b", "c")
	sink := &profileSink{refuses: list[1].Diff}
	newServer(t, h, ServerConfig{Profiles: sink})
	c := newClient(t, h, Options{})
	if err := c.ReportProfiles(t.Context(), nil); err != nil {
		t.Errorf("nothing to report: %v", err)
	}
	// A second time, on the same stream.
	for range 2 {
		sink.got = nil
		if err := c.ReportProfiles(t.Context(), list); !errors.Is(err, blockdev.ErrUnauthorized) {
			t.Errorf("one is refused: %v", err)
		}
		if want := []blockdev.DiffProfile{list[0], list[2]}; !reflect.DeepEqual(sink.got, want) {
			t.Errorf("taken %v, want %v", sink.got, want)
		}
	}
	if id := c.keeper.host.ID().String(); sink.peers[0] != id {
		t.Errorf("reported by %q, not %q", sink.peers[0], id)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.ReportProfiles(ctx, list); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A server of an older version, or without a sink, refuses the protocol.
func TestReportProfilesUnknown(t *testing.T) {
	h := newHost(t, nil, loopback)
	st, _ := newStore(t, false)
	newServer(t, h, ServerConfig{Chunks: st})
	c := newClient(t, h, Options{})
	if err := c.ReportProfiles(t.Context(), testProfiles("a")); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("%v", err)
	}
}

func TestReportProfilesBusy(t *testing.T) {
	h := newHost(t, nil, loopback)
	inside, release := make(chan struct{}), make(chan struct{})
	sink := &profileSink{hook: sync.OnceFunc(func() { close(inside); <-release })}
	newServer(t, h, ServerConfig{Profiles: sink, Limits: Limits{Profiles: 1}})
	a, b := newClient(t, h, Options{}), newClient(t, h, Options{})
	first := make(chan error)
	go func() { first <- a.ReportProfiles(t.Context(), testProfiles("a")) }()
	<-inside
	if err := b.ReportProfiles(t.Context(), testProfiles("b")); !errors.Is(err, wire.ErrBusy) {
		t.Errorf("at the limit: %v", err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if err := b.ReportProfiles(t.Context(), testProfiles("b")); err != nil {
		t.Error(err)
	}
}

func TestHostileProfileServer(t *testing.T) {
	for name, b := range map[string][]byte{
		"nothing":    nil,
		"garbage":    {3, 0xff, 0xff, 0xff},
		"too long":   {0xff, 0xff, 0xff, 0x7f},
		"cut":        {100, 1},
		"no message": {0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	} {
		t.Run(name, func(t *testing.T) {
			c := liar(t, ProfileProtocol, Options{ImageTimeout: 5 * time.Second}, sends(b), false)
			if err := c.ReportProfiles(t.Context(), testProfiles("a")); !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, blockdev.ErrUnavailable) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestHostileProfileClient(t *testing.T) {
	h := newHost(t, nil, loopback)
	sink := &profileSink{}
	newServer(t, h, ServerConfig{Profiles: sink})
	for name, b := range map[string][]byte{
		"too long":   {0xff, 0xff, 0xff, 0x7f},
		"garbage":    {3, 0xff, 0xff, 0xff},
		"no diff":    encode(t, &wire.ProfileReport{Profile: []byte{0, 0}}),
		"no profile": encode(t, &wire.ProfileReport{Diff: make([]byte, 32)}),
		"bad rows":   encode(t, &wire.ProfileReport{Diff: make([]byte, 32), Profile: []byte{0, 0, 0, 0}}),
	} {
		st := dial(t, peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}, ProfileProtocol)
		_ = st.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := st.Write(b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := io.ReadAll(st); err == nil || len(got) > 0 {
			t.Errorf("%s: answered %x, %v; want a reset", name, got, err)
		}
	}
	if len(sink.got) > 0 {
		t.Errorf("taken: %v", sink.got)
	}
}

// TestImageProfiles: profiles travel with the indexes, as many as have room, and
// broken ones are a broken answer.
func TestImageProfiles(t *testing.T) {
	h := newHost(t, nil, loopback)
	img := testImage()
	img.Layers[0].Profile = blockdev.Profile{{Chunk: 4, Rank: 9}, {Chunk: 1, Rank: 10}}
	img.Layers[2].Profile = blockdev.Profile{{Chunk: 0, Rank: 0}}
	newServer(t, h, ServerConfig{Images: imagesFunc(func(context.Context, string, image.Request) (*image.Image, error) { return img, nil })})
	c := newClient(t, h, Options{})
	got, err := c.FetchIndexes(t.Context(), testRequest())
	if err != nil {
		t.Fatal(err)
	}
	for i := range img.Layers {
		if g, w := got.Layers[i].Profile, img.Layers[i].Profile; len(g) != len(w) || len(w) > 0 && !reflect.DeepEqual(g, w) {
			t.Errorf("layer %d: %v, want %v", i, g, w)
		}
	}

	var long blockdev.Profile
	for i := range uint32(blockdev.MaxProfile) {
		long = append(long, blockdev.Touch{Chunk: (i%2)*(1<<31) + i, Rank: i << 15})
	}
	img = &image.Image{Ref: "r", Manifest: blockdev.Sum([]byte("m"))}
	for i := range 60 {
		img.Layers = append(img.Layers, image.Layer{Digest: blockdev.Sum([]byte{byte(i)}), Index: []byte{1}, Profile: long})
	}
	got, err = c.FetchIndexes(t.Context(), testRequest())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, l := range got.Layers {
		n += min(len(l.Profile), 1)
	}
	if n == 0 || n == len(got.Layers) {
		t.Errorf("%d of %d long profiles came", n, len(got.Layers))
	}

	bad := &wire.ImageFrame{Part: &wire.ImageFrame_Header{Header: &wire.ImageHeader{Manifest: make([]byte, 32), Layers: []*wire.LayerHeader{
		{Digest: make([]byte, 32), DiffId: make([]byte, 32), IndexLength: 1, Profile: []byte{0x80}},
	}}}}
	if _, err := liar(t, ImageProtocol, Options{}, sends(encode(t, bad)), false).FetchIndexes(t.Context(), testRequest()); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("a broken profile: %v", err)
	}
}

// A chunk by a startup profile waits for demand, but only a moment.
func TestStartupGoesOnUnderDemand(t *testing.T) {
	st, chunks := newStore(t, true, text(1, 5000), text(2, 5000))
	inDemand, release := make(chan struct{}), make(chan struct{})
	st.hook = func(_ context.Context, d blockdev.Digest) error {
		if d == chunks[1].Digest {
			close(inDemand)
			<-release
		}
		return nil
	}
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st, Limits: Limits{DemandPause: time.Hour, StartupPause: time.Millisecond}})
	c := newClient(t, h, Options{})
	var wg sync.WaitGroup
	wg.Go(func() { _ = c.Fetch(t.Context(), request(blockdev.Demand, chunks[1:]), discard) })
	<-inDemand
	if err := c.Fetch(t.Context(), request(blockdev.Startup, chunks[:1]), discard); err != nil {
		t.Error(err)
	}
	close(release)
	wg.Wait()
}
