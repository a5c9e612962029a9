package control

import (
	"context"
	"net/http"
)

// Reloaded says what reading the config again has done, by keys.
type Reloaded struct {
	// Changed count now; Restart are other than what runs, and need a restart.
	Changed []string `json:"changed"`
	Restart []string `json:"restart"`
}

// Reloader is a Daemon that reads its config again.
type Reloader interface {
	// Reload changes nothing if the config has an error.
	Reload() (*Reloaded, error)
}

func serveReload(mux *http.ServeMux, d Daemon) {
	r, ok := d.(Reloader)
	if !ok {
		return
	}
	mux.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, _ *http.Request) {
		done, err := r.Reload()
		answer(w, done, err, http.StatusBadRequest)
	})
}

// Reload has the daemon read its config again.
func (c Client) Reload(ctx context.Context) (*Reloaded, error) {
	return quickly[*Reloaded](ctx, c, http.MethodPost, "/v1/reload", nil)
}
