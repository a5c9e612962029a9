package supernode

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/supernode/layers"
)

// link is a Sibling without a network: requests of one supernode to another.
type link struct {
	from peer.ID
	to   *atomic.Pointer[Supernode]
	cut  *atomic.Bool // the other one is gone
}

var errCut = fmt.Errorf("gone: %w", blockdev.ErrUnavailable)

func (l link) Status() error {
	if l.cut.Load() {
		return errCut
	}
	return nil
}

func (l link) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	if l.cut.Load() {
		return nil, errCut
	}
	return l.to.Load().FetchIndexesFor(ctx, l.from.String(), req)
}

func (l link) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	if l.cut.Load() {
		return errCut
	}
	return l.to.Load().Fetch(ctx, req, deliver)
}

// cluster is some supernodes that know each other.
type cluster struct {
	ids []peer.ID
	s   []*Supernode
	cut []*atomic.Bool // by supernode: nobody reaches it
	// known are the siblings that each has begun with.
	known []map[peer.ID]layers.Sibling
}

func startCluster(t *testing.T, n int) *cluster {
	t.Helper()
	c := &cluster{}
	var at []*atomic.Pointer[Supernode]
	for i := range n {
		c.ids = append(c.ids, host.FromKey([32]byte{byte(i + 1)}))
		at = append(at, &atomic.Pointer[Supernode]{})
		c.cut = append(c.cut, &atomic.Bool{})
	}
	for i := range n {
		siblings := map[peer.ID]layers.Sibling{}
		for j, id := range c.ids {
			if j != i {
				siblings[id] = link{from: c.ids[i], to: at[j], cut: c.cut[j]}
			}
		}
		s := start(t, func(cfg *Config) { cfg.Self, cfg.Siblings = c.ids[i], siblings })
		at[i].Store(s)
		c.known = append(c.known, siblings)
		c.s = append(c.s, s)
	}
	return c
}

// owner is the position of the supernode that a layer belongs to.
func (c *cluster) owner(l registrytest.Layer) int {
	first := route.Order(l.DiffID, c.ids)[0]
	for i, id := range c.ids {
		if id == first {
			return i
		}
	}
	return -1
}

// stored waits until a supernode has a layer of its own.
func (c *cluster) stored(t *testing.T, i int, l registrytest.Layer) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := c.s[i].store.Layer(blockdev.Sum(l.Blob)); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("supernode %d does not get layer %s", i, l.DiffID)
		}
		<-tick.C
	}
}

// someLayers makes layers such that each of n supernodes owns at least one.
func (c *cluster) someLayers(t *testing.T) []registrytest.Layer {
	t.Helper()
	var layers []registrytest.Layer
	owners := map[int]bool{}
	for i := 0; len(owners) < len(c.ids) || i < 4; i++ {
		l := registrytest.GzipLayer(t, fmt.Sprint("file", i), 300_000, uint64(i+1))
		owners[c.owner(l)] = true
		layers = append(layers, l)
	}
	return layers
}

func blobs(reg *registrytest.Fake, layers []registrytest.Layer) (most int) {
	for _, l := range layers {
		most = max(most, len(reg.Requests("GET", "/blobs/"+blockdev.Sum(l.Blob).String())))
	}
	return most
}

// Each layer is fetched from the registry once, by its owner, whichever supernode
// is asked; and the next one has a copy, so that when one is gone nothing of it is
// fetched again.
func TestSiblings(t *testing.T) {
	for n := 2; n <= 3; n++ {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			reg := registrytest.NewFake(t)
			c := startCluster(t, n)
			layers := c.someLayers(t)
			reg.Push(t, "team/app", "v1", layers...)
			img, err := c.s[0].FetchIndexesFor(t.Context(), "node", request(reg.Target, "team/app:v1", nobody))
			if err != nil {
				t.Fatal(err)
			}
			wantImage(t, c.s[0], img, layers...)
			for _, l := range layers {
				order := route.Order(l.DiffID, c.ids)
				for i, id := range c.ids {
					if id == order[0] || id == order[1] {
						c.stored(t, i, l)
					}
				}
			}
			if most := blobs(reg, layers); most != 1 {
				t.Errorf("a layer was fetched %d times from the registry", most)
			}
			// Any one of them may go: the others have all of it.
			c.cut[0].Store(true)
			reg.Forget()
			img, err = c.s[1].FetchIndexesFor(t.Context(), "node", request(reg.Target, "team/app:v1", nobody))
			if err != nil {
				t.Fatal(err)
			}
			wantImage(t, c.s[1], img, layers...)
			if most := blobs(reg, layers); most != 0 {
				t.Errorf("after one was gone, a layer was fetched %d times from the registry", most)
			}
		})
	}
}

// Everybody asks everybody at once: one fetch all the same, and no deadlock.
func TestSiblingsAtOnce(t *testing.T) {
	reg := registrytest.NewFake(t)
	c := startCluster(t, 3)
	layers := c.someLayers(t)
	reg.Push(t, "team/app", "v1", layers...)
	ended := make(chan error)
	for i := range 9 {
		go func() {
			_, err := c.s[i%3].FetchIndexesFor(t.Context(), fmt.Sprint("node", i), request(reg.Target, "team/app:v1", nobody))
			ended <- err
		}()
	}
	for range 9 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if most := blobs(reg, layers); most != 1 {
		t.Errorf("a layer was fetched %d times from the registry", most)
	}
}

// The owner is gone from the start: the next one fetches.
func TestOwnerGone(t *testing.T) {
	reg := registrytest.NewFake(t)
	c := startCluster(t, 2)
	layers := c.someLayers(t)
	reg.Push(t, "team/app", "v1", layers...)
	c.cut[1].Store(true)
	img, err := c.s[0].FetchIndexesFor(t.Context(), "node", request(reg.Target, "team/app:v1", nobody))
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, c.s[0], img, layers...)
	// It is back, without anything: it gets its own from the other one.
	c.cut[1].Store(false)
	reg.Forget()
	if img, err = c.s[1].FetchIndexesFor(t.Context(), "node", request(reg.Target, "team/app:v1", nobody)); err != nil {
		t.Fatal(err)
	}
	wantImage(t, c.s[1], img, layers...)
	if most := blobs(reg, layers); most != 0 {
		t.Errorf("a layer that a sibling has was fetched %d times from the registry", most)
	}
}

// What is for supernodes alone is refused to nodes, and a sibling's word does not
// replace a node's access.
func TestSiblingsAccess(t *testing.T) {
	reg := registrytest.NewFake(t)
	c := startCluster(t, 2)
	layers := c.someLayers(t)
	reg.Push(t, "team/app", "v1", layers...)
	reg.SetAuth(registrytest.Basic, users, onlyAliceReads)
	req := request(reg.Target, "team/app:v1", alice)
	if _, err := c.s[0].FetchIndexesFor(t.Context(), "node", req); err != nil {
		t.Fatal(err)
	}
	for i := range c.s {
		_, err := c.s[i].FetchIndexesFor(t.Context(), "other", request(reg.Target, "team/app:v1", nobody))
		wantErr(t, err, blockdev.ErrUnauthorized)
	}
	req.Only = []blockdev.Digest{blockdev.Sum(layers[0].Blob)}
	_, err := c.s[0].FetchIndexesFor(t.Context(), "node", req)
	wantErr(t, err, blockdev.ErrUnauthorized, "only supernodes")
}

// Who has fetched in its place gives the layer to the owner when that is back, and
// the registry is not asked again, however that comes about.
func TestReplicateToOwner(t *testing.T) {
	reg := registrytest.NewFake(t)
	c := startCluster(t, 2)
	var l registrytest.Layer
	for i := 0; ; i++ {
		if l = registrytest.GzipLayer(t, fmt.Sprint("file", i), 300_000, uint64(i+1)); c.owner(l) == 1 {
			break
		}
	}
	reg.Push(t, "team/app", "v1", l)
	// The owner is away when it is asked, and there again when it is to have a copy.
	reg.SetHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/"+blockdev.Sum(l.Blob).String()) {
			c.cut[1].Store(false)
		}
		return false
	})
	c.cut[1].Store(true)
	if _, err := c.s[0].FetchIndexesFor(t.Context(), "node", request(reg.Target, "team/app:v1", nobody)); err != nil {
		t.Fatal(err)
	}
	c.stored(t, 1, l)
	if most := blobs(reg, []registrytest.Layer{l}); most != 1 {
		t.Errorf("the layer was fetched %d times from the registry", most)
	}
}

// TestSetSiblings: supernodes that are siblings no more get their layers from the registry,
// and do for each other what they do for nodes; as siblings again they copy.
func TestSetSiblings(t *testing.T) {
	reg := registrytest.NewFake(t)
	c := startCluster(t, 2)
	ref := c.someLayers(t)
	reg.Push(t, "team/app", "v1", ref...)
	open := func(i, times int) {
		t.Helper()
		img, err := c.s[i].FetchIndexesFor(t.Context(), "node", request(reg.Target, "team/app:v1", nobody))
		if err != nil {
			t.Fatal(err)
		}
		wantImage(t, c.s[i], img, ref...)
		if most := blobs(reg, ref); most != times {
			t.Errorf("a layer was fetched %d times from the registry, want %d", most, times)
		}
	}
	c.s[1].SetSiblings(nil)
	c.s[0].SetSiblings(map[peer.ID]layers.Sibling{})
	open(0, 1)
	req := request(reg.Target, "team/app:v1", nobody)
	req.Only = []blockdev.Digest{blockdev.Sum(ref[0].Blob)}
	_, err := c.s[0].FetchIndexesFor(t.Context(), c.ids[1].String(), req)
	wantErr(t, err, blockdev.ErrUnauthorized, "only supernodes")
	for i := range c.s {
		c.s[i].SetSiblings(c.known[i])
	}
	open(1, 1)
}
