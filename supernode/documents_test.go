package supernode

import (
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestDocumentAccess: a private repository's manifests and configs are for those
// whom its registry lets in, known here or not.
func TestDocumentAccess(t *testing.T) {
	f := registrytest.NewFake(t)
	layer := registrytest.GzipLayer(t, "a", 1000, 1)
	id := f.Push(t, "private/app", "v1", layer)
	config := blockdev.Sum(registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layer))
	f.SetAuth(registrytest.Bearer, users, onlyAliceReads)
	s := start(t)
	name := f.Host + "/private/app"
	refs := []image.DocumentRequest{
		{Ref: name + ":v1"}, {Ref: name + "@" + id.String()}, {Ref: name + "@" + config.String(), Kind: image.ConfigDocument},
	}
	stranger := image.Credential{Username: alice.Username, Secret: "guess"}
	get := func(peer string, req image.DocumentRequest, c image.Credential) error {
		req.Credential = c
		_, err := s.DocumentFor(t.Context(), peer, req)
		return err
	}
	wantErr(t, get("q", refs[0], nobody), blockdev.ErrUnauthorized, name)
	for _, req := range refs {
		if err := get("p", req, alice); err != nil {
			t.Error(err)
		}
	}
	// Whether a digest is known as a config is not for strangers to learn.
	unknown := image.DocumentRequest{Ref: name + "@" + blockdev.Sum([]byte("unknown")).String(), Kind: image.ConfigDocument}
	for _, req := range slices.Concat(refs, []image.DocumentRequest{unknown}) {
		for _, c := range []image.Credential{nobody, stranger} {
			wantErr(t, get("q", req, c), blockdev.ErrUnauthorized)
		}
	}
	// A thousand nodes with one credential cost what one of them does.
	f.Forget()
	for i := range 10 {
		for _, req := range refs {
			if err := get(fmt.Sprint("node", i), req, alice); err != nil {
				t.Error(err)
			}
		}
	}
	if got := f.Requests(); len(got) != 0 {
		t.Errorf("within the window the registry was asked %v", got)
	}
	// A layer's digest is no config, and makes nobody ask.
	wantErr(t, get("p", image.DocumentRequest{Ref: name + "@" + blockdev.Sum(layer.Blob).String(), Kind: image.ConfigDocument}, alice), blockdev.ErrNotFound)
	if got := f.Requests(); len(got) != 0 {
		t.Errorf("for a layer the registry was asked %v", got)
	}
	wantErr(t, get("p", image.DocumentRequest{Ref: "no reference"}, alice), blockdev.ErrNotFound)
}

// TestDocumentAfterExpiry: when the window is over a config is asked about as a
// blob, since its registry has no manifest of that digest.
func TestDocumentAfterExpiry(t *testing.T) {
	f := registrytest.NewFake(t)
	layer := registrytest.GzipLayer(t, "a", 1000, 1)
	f.Push(t, "private/app", "v1", layer)
	config := blockdev.Sum(registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layer))
	f.SetAuth(registrytest.Basic, users, onlyAliceReads)
	s := start(t, func(c *Config) { c.AccessTTL = time.Nanosecond })
	if _, err := s.DocumentFor(t.Context(), "p", image.DocumentRequest{Ref: f.Host + "/private/app:v1", Credential: alice}); err != nil {
		t.Fatal(err)
	}
	req := image.DocumentRequest{Ref: f.Host + "/private/app@" + config.String(), Kind: image.ConfigDocument, Credential: alice}
	if _, err := s.DocumentFor(t.Context(), "p", req); err != nil {
		t.Error(err)
	}
	req.Credential = nobody
	_, err := s.DocumentFor(t.Context(), "q", req)
	wantErr(t, err, blockdev.ErrUnauthorized)
}

// TestDocumentsOfPrefetchedImage: what FetchIndexes has made known is there for
// whoever comes when the registry is gone, after a restart, too.
func TestDocumentsOfPrefetchedImage(t *testing.T) {
	f := registrytest.NewFake(t)
	layer := registrytest.GzipLayer(t, "a", 1000, 1)
	id := f.Push(t, "app", "v1", layer)
	index := registrytest.JSON(t, map[string]any{"schemaVersion": 2, "mediaType": registrytest.TypeIndex, "manifests": []registrytest.Descriptor{
		{MediaType: registrytest.TypeManifest, Digest: id, Size: 1, Platform: &registrytest.Platform{OS: "linux", Architecture: "amd64"}},
	}})
	indexID := f.PushManifest(t, "app", "multi", registrytest.TypeIndex, index)
	config := blockdev.Sum(registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layer))
	dir := filepath.Join(t.TempDir(), "data")
	s := start(t, at(dir))
	if err := warm(t, s, request(f.Target, "app:multi", nobody), nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	s = start(t, at(dir))
	var wg sync.WaitGroup
	for _, req := range []image.DocumentRequest{
		{Ref: f.Host + "/app:multi", Head: true}, {Ref: f.Host + "/app:multi"}, {Ref: f.Host + "/app@" + indexID.String()},
		{Ref: f.Host + "/app@" + id.String()}, {Ref: f.Host + "/app@" + config.String(), Kind: image.ConfigDocument},
	} {
		wg.Go(func() {
			if _, err := s.DocumentFor(t.Context(), "a new node", req); err != nil {
				t.Errorf("%+v: %v", req, err)
			}
		})
	}
	wg.Wait()
	if _, err := s.Document(t.Context(), image.DocumentRequest{Ref: f.Host + "/app:v2"}); err == nil {
		t.Error("a tag that nobody has asked for is known")
	}
}
