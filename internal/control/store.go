package control

import (
	"context"
	"net/http"
	"time"
)

// StoredLayer is a layer that a supernode has stored.
type StoredLayer struct {
	Layer  string    `json:"layer"`
	DiffID string    `json:"diff_id"`
	Size   int64     `json:"size"` // bytes, as at its registry
	Used   time.Time `json:"used"`
	Pinned bool      `json:"pinned"`
	// Images are those that are known to have it: the pinned ones, and those that were
	// asked for since the supernode's start.
	Images []string `json:"images"`
	// Origins are the repositories that have shown to have it.
	Origins []string `json:"origins"`
}

// StoreKeeper is what a supernode's Daemon has beside.
type StoreKeeper interface {
	// Stored lists all layers, the largest first.
	Stored() []StoredLayer
	// Remove takes an image's name, or a digest of a layer or diff, and returns the
	// layers that are gone.
	Remove(ctx context.Context, what string) (layers []string, err error)
	// Pin keeps an image in the store; Unpin takes that back.
	Pin(ctx context.Context, ref string) error
	Unpin(ref string) error
}

// storeRequest names an image or a digest.
type storeRequest struct {
	What string `json:"what"`
}

// serveStore adds what a supernode answers; other daemons say that they are none.
func serveStore(mux *http.ServeMux, d Daemon) {
	k, ok := d.(StoreKeeper)
	if !ok {
		mux.HandleFunc("/v1/store/", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "this is a node: the store is the supernode's, so ask there, or name its socket with --control", http.StatusNotFound)
		})
		return
	}
	mux.HandleFunc("GET /v1/store/list", func(w http.ResponseWriter, _ *http.Request) { answer(w, k.Stored(), nil, 0) })
	for name, do := range map[string]func(context.Context, string) ([]string, error){
		"remove": k.Remove,
		"pin":    func(ctx context.Context, ref string) ([]string, error) { return []string{}, k.Pin(ctx, ref) },
		"unpin":  func(_ context.Context, ref string) ([]string, error) { return []string{}, k.Unpin(ref) },
	} {
		mux.HandleFunc("POST /v1/store/"+name, change(func(ctx context.Context, req storeRequest) ([]string, error) { return do(ctx, req.What) }))
	}
}

// Stored asks a supernode for all layers in its store.
func (c Client) Stored(ctx context.Context) ([]StoredLayer, error) {
	return quickly[[]StoredLayer](ctx, c, http.MethodGet, "/v1/store/list", nil)
}

// Remove has a supernode remove an image, or the layer or diff with a digest, from its
// store. It returns the layers that are gone.
func (c Client) Remove(ctx context.Context, what string) ([]string, error) {
	return c.changeStore(ctx, "remove", what)
}

// Pin has a supernode keep an image in its store.
func (c Client) Pin(ctx context.Context, ref string) error {
	_, err := c.changeStore(ctx, "pin", ref)
	return err
}

// Unpin takes a Pin back.
func (c Client) Unpin(ctx context.Context, ref string) error {
	_, err := c.changeStore(ctx, "unpin", ref)
	return err
}

// changeStore may ask a registry, so it waits for as long as ctx does.
func (c Client) changeStore(ctx context.Context, how, what string) ([]string, error) {
	return ask[[]string](ctx, c, http.MethodPost, "/v1/store/"+how, storeRequest{what})
}
