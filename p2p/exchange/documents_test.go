package exchange

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// documentsFunc is a Documents made of a function.
type documentsFunc func(ctx context.Context, peer string, req image.DocumentRequest) (*image.Document, error)

func (f documentsFunc) DocumentFor(ctx context.Context, peer string, req image.DocumentRequest) (*image.Document, error) {
	return f(ctx, peer, req)
}

func newDocument(n int) *image.Document {
	b := blockdevtest.Bytes(1, n)
	return &image.Document{Digest: blockdev.Sum(b), MediaType: "application/vnd.oci.image.index.v1+json", Size: int64(n), Data: b}
}

func TestDocument(t *testing.T) {
	h := newHost(t, nil, loopback)
	var gotPeer string
	var gotReq image.DocumentRequest
	var have *image.Document
	newServer(t, h, ServerConfig{Documents: documentsFunc(func(_ context.Context, peer string, req image.DocumentRequest) (*image.Document, error) {
		gotPeer, gotReq = peer, req
		doc := *have
		if req.Head {
			doc.Data = nil
		}
		return &doc, nil
	})})
	c := newClient(t, h, Options{})
	for _, n := range []int{1, wire.MaxIndexData, 3*wire.MaxIndexData + 5, image.MaxDocument} {
		have = newDocument(n)
		req := image.DocumentRequest{Ref: "docker.io/library/redis:7", Credential: image.Credential{Username: "u", Secret: "s"}}
		got, err := c.Document(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, have) {
			t.Errorf("a document of %d bytes has changed on the way", n)
		}
		if gotPeer != c.keeper.host.ID().String() || !reflect.DeepEqual(gotReq, req) {
			t.Errorf("peer %q asked for %+v", gotPeer, gotReq)
		}
		req.Kind, req.Head = image.ConfigDocument, true
		want := *have
		want.Data = nil
		if got, err = c.Document(t.Context(), req); err != nil || !reflect.DeepEqual(got, &want) || !reflect.DeepEqual(gotReq, req) {
			t.Errorf("without the bytes: %+v, %v", got, err)
		}
	}
	have = newDocument(image.MaxDocument + 1)
	if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1"}); !errors.Is(err, blockdev.ErrUnsupported) {
		t.Errorf("too large: %v", err)
	}
	have = &image.Document{Size: 3, Data: []byte("ab")}
	if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1"}); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("a source that contradicts itself: %v", err)
	}
}

func TestDocumentErrors(t *testing.T) {
	h := newHost(t, nil, loopback)
	var fail error
	newServer(t, h, ServerConfig{Documents: documentsFunc(func(context.Context, string, image.DocumentRequest) (*image.Document, error) {
		return nil, fail
	})})
	c := newClient(t, h, Options{})
	for _, want := range []error{blockdev.ErrNotFound, blockdev.ErrUnauthorized, blockdev.ErrUnsupported, blockdev.ErrUnavailable, blockdev.ErrCorrupt} {
		fail = fmt.Errorf("registry says no: %w", want)
		_, err := c.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1"})
		if !errors.Is(err, want) || !strings.Contains(err.Error(), "r/a:1") || !strings.Contains(err.Error(), "registry says no") {
			t.Errorf("%v came as %v", want, err)
		}
	}
	if _, err := c.Document(t.Context(), image.DocumentRequest{}); !errors.Is(err, blockdev.ErrUnsupported) {
		t.Errorf("no reference: %v", err)
	}
}

// Requests over the limit are turned away, and one that ends makes room. While a
// slow registry is waited for, the client hears that somebody is at it.
func TestDocumentWaits(t *testing.T) {
	h := newHost(t, nil, loopback)
	release, began := make(chan struct{}), make(chan struct{}, 1)
	newServer(t, h, ServerConfig{
		Limits: Limits{DocumentsPerPeer: 1, WorkingInterval: 10 * time.Millisecond},
		Documents: documentsFunc(func(ctx context.Context, _ string, _ image.DocumentRequest) (*image.Document, error) {
			began <- struct{}{}
			select {
			case <-release:
				return newDocument(5), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}),
	})
	c := newClient(t, h, Options{ImageTimeout: time.Second})
	first := make(chan error)
	go func() {
		_, err := c.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1"})
		first <- err
	}()
	<-began
	if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1"}); !errors.Is(err, wire.ErrBusy) {
		t.Errorf("second request: %v, want busy", err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1"}); err != nil {
		t.Error(err)
	}
}

// Requests that wait for a registry take no place from those whose document is there: neither
// another peer's nor the same one's.
func TestDocumentWaitsTakeNoPlace(t *testing.T) {
	h := newHost(t, nil, loopback)
	const waiting = 6
	var entered sync.WaitGroup
	entered.Add(waiting)
	release := make(chan struct{})
	newServer(t, h, ServerConfig{
		Limits: Limits{Documents: waiting},
		Documents: documentsFunc(func(_ context.Context, _ string, req image.DocumentRequest) (*image.Document, error) {
			if strings.HasPrefix(req.Ref, "hangs/") {
				entered.Done()
				<-release
			}
			return newDocument(5), nil
		}),
	})
	c, other := newClient(t, h, Options{}), newClient(t, h, Options{})
	var wg sync.WaitGroup
	for range waiting {
		wg.Go(func() {
			if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: "hangs/a:1"}); err != nil {
				t.Error(err)
			}
		})
	}
	entered.Wait()
	for _, c := range []*Client{other, c} {
		if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1"}); err != nil {
			t.Errorf("while others wait: %v", err)
		}
	}
	close(release)
	wg.Wait()
}

// Of all requests that wait, one registry's are half at the most: however many nodes ask
// for what a registry that hangs has, there is room to wait for the others.
func TestDocumentWaitsAreShared(t *testing.T) {
	h := newHost(t, nil, loopback)
	began, release := make(chan struct{}, 10), make(chan struct{})
	newServer(t, h, ServerConfig{
		Limits: Limits{Waiting: 4},
		Documents: documentsFunc(func(context.Context, string, image.DocumentRequest) (*image.Document, error) {
			began <- struct{}{}
			<-release
			return newDocument(5), nil
		}),
	})
	c := newClient(t, h, Options{})
	ask := func(ref string) error {
		_, err := c.Document(t.Context(), image.DocumentRequest{Ref: ref})
		return err
	}
	var wg sync.WaitGroup
	for _, r := range []struct {
		host string
		wait int // so many of its requests
	}{{"Hangs.example", 2}, {"b.example", 1}, {"c.example", 1}, {"d.example", 0}} {
		for i := range r.wait {
			wg.Go(func() {
				if err := ask(fmt.Sprintf("%s/a:%d", r.host, i)); err != nil {
					t.Error(err)
				}
			})
			<-began
		}
		if err := ask(strings.ToLower(r.host) + "/other:1"); !errors.Is(err, wire.ErrBusy) {
			t.Errorf("%s beside %d of its own: %v, want busy", r.host, r.wait, err)
		}
	}
	close(release)
	wg.Wait()
	if err := ask("hangs.example/a:1"); err != nil {
		t.Errorf("when all have been answered: %v", err)
	}
}

// The documents in memory that are being sent are bounded, also where a client does not
// read its own: one that has no room is let go, and its client asks again.
func TestDocumentsBeingSent(t *testing.T) {
	h := newHost(t, nil, loopback)
	large := newDocument(image.MaxDocument)
	newServer(t, h, ServerConfig{
		Limits: Limits{Documents: 1, FirstSign: time.Hour}, // the first byte is the document's
		Documents: documentsFunc(func(_ context.Context, _ string, req image.DocumentRequest) (*image.Document, error) {
			if req.Ref == "r/large:1" {
				return large, nil
			}
			return newDocument(5), nil
		}),
	})
	c, other := newClient(t, h, Options{}), newClient(t, h, Options{})
	if err := c.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := c.keeper.host.NewStream(t.Context(), h.ID(), DocumentProtocol)
	if err != nil {
		t.Fatal(err)
	}
	req, err := wire.NewDocumentRequest(&image.DocumentRequest{Ref: "r/large:1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write(encode(t, req)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(st, make([]byte, 1)); err != nil { // it has begun, and more is not read
		t.Fatal(err)
	}
	ask := func() error {
		_, err := other.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1"})
		return err
	}
	if err := ask(); !errors.Is(err, wire.ErrBusy) {
		t.Errorf("beside one that is being sent: %v, want busy", err)
	}
	if err := st.Reset(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the place to be free again", func() bool { return ask() == nil })
}

func TestHostileDocumentServer(t *testing.T) {
	header := func(size int64) *wire.DocumentFrame {
		return &wire.DocumentFrame{Part: &wire.DocumentFrame_Header{Header: &wire.DocumentHeader{Digest: make([]byte, 32), Size: size}}}
	}
	data := func(n int) *wire.DocumentFrame {
		return &wire.DocumentFrame{Part: &wire.DocumentFrame_Data{Data: make([]byte, n)}}
	}
	for _, c := range []struct {
		name  string
		write func(io.Writer) error
		head  bool
		want  error
	}{
		{"garbage", sends(bytes.Repeat([]byte{0xee}, 100)), false, blockdev.ErrCorrupt},
		{"nothing", sends(nil), false, blockdev.ErrUnavailable},
		{"data alone", sends(encode(t, data(1))), false, blockdev.ErrCorrupt},
		{"two headers", sends(encode(t, header(1), header(1))), false, blockdev.ErrCorrupt},
		{"cut", sends(encode(t, header(5), data(4))), false, blockdev.ErrUnavailable},
		{"too much", sends(encode(t, header(5), data(6))), false, blockdev.ErrCorrupt},
		{"claims too much", sends(encode(t, header(image.MaxDocument+1))), false, blockdev.ErrCorrupt},
		{"negative", sends(encode(t, header(-1))), true, blockdev.ErrCorrupt},
		{"endless working", func(w io.Writer) error {
			for b := encode(t, &wire.DocumentFrame{Part: &wire.DocumentFrame_Working{Working: &wire.Working{}}}); ; {
				if _, err := w.Write(b); err != nil {
					return err
				}
			}
		}, false, blockdev.ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := liar(t, DocumentProtocol, Options{}, c.write, false)
			doc, err := client.Document(t.Context(), image.DocumentRequest{Ref: "r/a:1", Head: c.head})
			if !errors.Is(err, c.want) || doc != nil {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// A client that wants to know hears how far the layers are, each one's last word;
// another one does not.
func TestProgress(t *testing.T) {
	h := newHost(t, nil, loopback)
	a, b := blockdev.Sum([]byte("a")), blockdev.Sum([]byte("b"))
	heard := make(chan struct{})
	newServer(t, h, ServerConfig{
		Limits: Limits{ProgressInterval: time.Millisecond},
		Images: imagesFunc(func(ctx context.Context, _ string, req image.Request) (*image.Image, error) {
			if req.Progress == nil {
				return testImage(), nil
			}
			req.Progress(image.Progress{Layer: a, Done: 1, Total: 9, Stage: image.StageFetching})
			req.Progress(image.Progress{Layer: b, Total: 5, Stage: image.StageWaiting})
			req.Progress(image.Progress{Layer: a, Done: 9, Total: 9, Stage: image.StageUnpacking})
			select {
			case <-heard:
			case <-ctx.Done():
			}
			return testImage(), nil
		}),
	})
	c := newClient(t, h, Options{})
	last := map[blockdev.Digest]image.Progress{}
	req := testRequest()
	req.Progress = func(p image.Progress) {
		last[p.Layer] = p
		if last[a].Stage == image.StageUnpacking && last[b].Total == 5 {
			close(heard)
		}
	}
	if _, err := c.FetchIndexes(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	want := map[blockdev.Digest]image.Progress{
		a: {Layer: a, Done: 9, Total: 9, Stage: image.StageUnpacking},
		b: {Layer: b, Total: 5, Stage: image.StageWaiting},
	}
	if !reflect.DeepEqual(last, want) {
		t.Errorf("heard %v", last)
	}
	if _, err := c.FetchIndexes(t.Context(), testRequest()); err != nil {
		t.Error(err)
	}
}
