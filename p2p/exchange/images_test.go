package exchange

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// imagesFunc is an Images made of a function.
type imagesFunc func(ctx context.Context, peer string, req image.Request) (*image.Image, error)

func (f imagesFunc) FetchIndexesFor(ctx context.Context, peer string, req image.Request) (*image.Image, error) {
	return f(ctx, peer, req)
}

// testImage has a layer without index, an index of one byte, and one that takes
// several frames.
func testImage() *image.Image {
	layer := func(name string, index []byte) image.Layer {
		return image.Layer{Digest: blockdev.Sum([]byte(name)), Size: int64(100 + len(name)), DiffID: blockdev.Sum([]byte("diff " + name)), Index: index}
	}
	return &image.Image{
		Ref:      "docker.io/library/redis:7",
		Manifest: blockdev.Sum([]byte("manifest")),
		Layers: []image.Layer{
			layer("known", nil),
			layer("small", []byte{7}),
			layer("exact", blockdevtest.Bytes(1, wire.MaxIndexData)),
			layer("large", blockdevtest.Bytes(2, 3*wire.MaxIndexData+5)),
			layer("known too", nil),
		},
	}
}

func testRequest() image.Request {
	return image.Request{
		Ref:        "docker.io/library/redis:7",
		Manifest:   blockdev.Sum([]byte("index")),
		Platform:   image.Platform{OS: "linux", Architecture: "amd64"},
		Credential: image.Credential{Username: "u", Secret: "s"},
		Have:       []blockdev.Digest{blockdev.Sum([]byte("known")), blockdev.Sum([]byte("known too"))},
	}
}

func TestFetchIndexes(t *testing.T) {
	h := newHost(t, nil, loopback)
	var gotPeer string
	var gotReq image.Request
	newServer(t, h, ServerConfig{Images: imagesFunc(func(_ context.Context, peer string, req image.Request) (*image.Image, error) {
		gotPeer, gotReq = peer, req
		return testImage(), nil
	})})
	c := newClient(t, h, Options{})
	img, err := c.FetchIndexes(t.Context(), testRequest())
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(img, testImage()) {
		t.Error("the image has changed on the way")
	}
	if gotPeer != c.keeper.host.ID().String() {
		t.Errorf("peer %q asked, not %s", gotPeer, c.keeper.host.ID())
	}
	if !reflect.DeepEqual(gotReq, testRequest()) {
		t.Errorf("request arrived as %+v", gotReq)
	}
}

// An index that other nodes have does not come, but what it is and who they are does,
// to whom has asked for that; others refuse the answer.
func TestOpenRelayedImage(t *testing.T) {
	h := newHost(t, nil, loopback)
	want := testImage()
	want.Relays = []image.Relay{
		{Key: [32]byte{1, 2}, Addrs: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:7"), netip.MustParseAddrPort("[fd00::1]:8")}},
		{Key: [32]byte{3}, Addrs: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:7")}},
	}
	large := &want.Layers[3]
	large.IndexSize, large.IndexDigest, large.Index = int64(len(large.Index)), blockdev.Sum(large.Index), nil
	newServer(t, h, ServerConfig{Images: imagesFunc(func(context.Context, string, image.Request) (*image.Image, error) {
		return want, nil
	})})
	c := newClient(t, h, Options{})
	req := testRequest()
	req.Relay = true
	img, err := c.FetchIndexes(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(img, want) {
		t.Errorf("the image has changed on the way: %+v", img)
	}
	if _, err := c.FetchIndexes(t.Context(), testRequest()); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("relays that were not asked for: %v", err)
	}
	want.Relays = nil
	if _, err := c.FetchIndexes(t.Context(), req); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("an index that nobody has: %v", err)
	}
}

// An image without layers is one.
func TestOpenEmptyImage(t *testing.T) {
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Images: imagesFunc(func(context.Context, string, image.Request) (*image.Image, error) {
		return &image.Image{}, nil
	})})
	img, err := newClient(t, h, Options{}).FetchIndexes(t.Context(), testRequest())
	if err != nil || len(img.Layers) != 0 {
		t.Fatalf("%+v, %v", img, err)
	}
}

func TestFetchIndexesErrors(t *testing.T) {
	h := newHost(t, nil, loopback)
	var fail error
	newServer(t, h, ServerConfig{Images: imagesFunc(func(context.Context, string, image.Request) (*image.Image, error) {
		return nil, fail
	})})
	c := newClient(t, h, Options{})
	for _, want := range []error{
		blockdev.ErrNotFound, blockdev.ErrUnauthorized, blockdev.ErrUnsupported, blockdev.ErrUnavailable, blockdev.ErrCorrupt, blockdev.ErrNoSpace,
	} {
		fail = fmt.Errorf("registry says no\n: %w", want)
		_, err := c.FetchIndexes(t.Context(), testRequest())
		if !errors.Is(err, want) {
			t.Errorf("%v came as %v", want, err)
		}
		for _, part := range []string{"docker.io/library/redis:7", h.ID().String(), "registry says no"} {
			if !strings.Contains(fmt.Sprint(err), part) {
				t.Errorf("%q does not say %q", err, part)
			}
		}
	}
	if _, err := c.FetchIndexes(t.Context(), image.Request{}); !errors.Is(err, blockdev.ErrUnsupported) {
		t.Errorf("no reference: %v", err)
	}
}

// A server that needs its time says so; the client waits longer than it would
// for a silent one. When the client gives up, so does the server.
func TestFetchIndexesTakesLong(t *testing.T) {
	h := newHost(t, nil, loopback)
	ended := make(chan error, 1)
	release := make(chan struct{})
	newServer(t, h, ServerConfig{
		Limits: Limits{WorkingInterval: 10 * time.Millisecond},
		Images: imagesFunc(func(ctx context.Context, _ string, req image.Request) (*image.Image, error) {
			select {
			case <-release:
				return testImage(), nil
			case <-ctx.Done():
				ended <- ctx.Err()
				return nil, ctx.Err()
			}
		}),
	})
	// Far longer than the interval, far shorter than what is waited for below.
	c := newClient(t, h, Options{ImageTimeout: time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
	defer cancel()
	_, err := c.FetchIndexes(ctx, testRequest())
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want the context's error", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the server's work ended with %v", err)
	}
	close(release)
	if _, err := c.FetchIndexes(t.Context(), testRequest()); err != nil {
		t.Error(err)
	}
}

// busy counts the requests that the server answered with ErrBusy.
func busy(t testing.TB, reg *prometheus.Registry) (n float64) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "shoal_p2p_requests_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetValue() == "busy" {
					n += m.GetCounter().GetValue()
				}
			}
		}
	}
	return n
}

// The error says that the server was busy, also if the caller's time ends while the
// server works on the request that it took after that.
func TestBusyUntilTaken(t *testing.T) {
	h := newHost(t, nil, loopback)
	entered, release := make(chan string, 2), make(chan struct{})
	reg := prometheus.NewRegistry()
	newServer(t, h, ServerConfig{
		Limits: Limits{Images: 1, Waiting: 1}, Registerer: reg,
		Images: imagesFunc(func(ctx context.Context, _ string, req image.Request) (*image.Image, error) {
			entered <- req.Ref
			if req.Ref == "b" {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			<-release
			return &image.Image{}, nil
		}),
	})
	c := newClient(t, h, Options{Patient: true})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first, second := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := c.FetchIndexes(t.Context(), image.Request{Ref: "a"})
		first <- err
	}()
	<-entered
	go func() {
		_, err := c.FetchIndexes(ctx, image.Request{Ref: "b"})
		second <- err
	}()
	waitFor(t, "the server to be busy", func() bool { return busy(t, reg) > 0 })
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	<-entered
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) || !errors.Is(err, wire.ErrBusy) {
		t.Errorf("%v, want the context's error and that the server was busy", err)
	}
}

func TestImageLimits(t *testing.T) {
	h := newHost(t, nil, loopback)
	entered, release := make(chan struct{}), make(chan struct{})
	reg := prometheus.NewRegistry()
	newServer(t, h, ServerConfig{
		Limits: Limits{Images: 1, Waiting: 1}, Registerer: reg,
		Images: imagesFunc(func(_ context.Context, _ string, req image.Request) (*image.Image, error) {
			if req.Ref == "many/layers" {
				return &image.Image{Ref: req.Ref, Layers: make([]image.Layer, wire.MaxLayers+1)}, nil
			}
			if req.Ref == "a" {
				close(entered)
				<-release
			}
			return &image.Image{}, nil
		}),
	})
	var only atomic.Bool
	only.Store(true)
	c, patient := newClient(t, h, Options{}), newClient(t, h, Options{Patient: true, Only: only.Load})
	if _, err := c.FetchIndexes(t.Context(), image.Request{Ref: "many/layers"}); !errors.Is(err, blockdev.ErrUnsupported) {
		t.Errorf("too many layers: %v", err)
	}
	done := make(chan error, 2)
	go func() {
		_, err := c.FetchIndexes(t.Context(), image.Request{Ref: "a"})
		done <- err
	}()
	select {
	case <-entered:
	case err := <-done:
		t.Fatal(err)
	}
	if _, err := c.FetchIndexes(t.Context(), image.Request{Ref: "b"}); !errors.Is(err, wire.ErrBusy) {
		t.Errorf("over the limit: %v", err)
	}
	// Who is patient waits for as long as its context lasts.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	until := make(chan error, 1)
	go func() {
		_, err := patient.FetchIndexes(ctx, image.Request{Ref: "b"})
		until <- err
	}()
	waitFor(t, "the server to be busy again", func() bool { return busy(t, reg) >= 3 })
	cancel()
	if err := <-until; !errors.Is(err, context.Canceled) || !errors.Is(err, wire.ErrBusy) {
		t.Errorf("over the limit until the end: %v", err)
	}
	only.Store(false) // there is another one to ask now
	if _, err := patient.FetchIndexes(t.Context(), image.Request{Ref: "b"}); !errors.Is(err, wire.ErrBusy) {
		t.Errorf("over the limit, with another server to ask: %v", err)
	}
	only.Store(true)
	go func() {
		_, err := patient.FetchIndexes(t.Context(), image.Request{Ref: "b"})
		done <- err
	}()
	close(release)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// Requests that wait for an image to be opened take no place from those whose image
// is there.
func TestImageWaitsTakeNoPlace(t *testing.T) {
	h := newHost(t, nil, loopback)
	const waiting = 6
	var entered sync.WaitGroup
	entered.Add(waiting)
	release := make(chan struct{})
	newServer(t, h, ServerConfig{
		Limits: Limits{Images: 1},
		Images: imagesFunc(func(_ context.Context, _ string, req image.Request) (*image.Image, error) {
			if req.Ref == "slow" {
				entered.Done()
				<-release
			}
			return &image.Image{}, nil
		}),
	})
	c := newClient(t, h, Options{})
	var wg sync.WaitGroup
	for range waiting {
		wg.Go(func() {
			if _, err := c.FetchIndexes(t.Context(), image.Request{Ref: "slow"}); err != nil {
				t.Error(err)
			}
		})
	}
	entered.Wait()
	for range 3 {
		if _, err := c.FetchIndexes(t.Context(), image.Request{Ref: "stored"}); err != nil {
			t.Errorf("while others wait: %v", err)
		}
	}
	close(release) // then all of them are sent, one at a time
	wg.Wait()
}

// Large indexes arrive byte by byte as they were.
func TestLargeIndex(t *testing.T) {
	if testing.Short() {
		t.Skip("32 MiB")
	}
	want := blockdevtest.Bytes(9, 32<<20)
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Images: imagesFunc(func(context.Context, string, image.Request) (*image.Image, error) {
		return &image.Image{Layers: []image.Layer{{Index: want}}}, nil
	})})
	img, err := newClient(t, h, Options{}).FetchIndexes(t.Context(), testRequest())
	if err != nil || !bytes.Equal(img.Layers[0].Index, want) {
		t.Fatalf("%v", err)
	}
}
