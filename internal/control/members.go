package control

import (
	"context"
	"errors"
	"io"
	"net/http"
)

// Member is a node, as the supernode's list has it.
type Member struct {
	ID      string `json:"id"`
	Address string `json:"address,omitempty"`
	// Announced is where other nodes dial it.
	Announced []string `json:"announced,omitempty"`
	Zone      string   `json:"zone,omitempty"`
	Rack      string   `json:"rack,omitempty"`
	// MaxUpload is in bytes per second; 0: no limit.
	MaxUpload int64 `json:"max_upload,omitempty"`
	Images    int   `json:"images"`
	// Seconds since it joined.
	Seconds int64 `json:"seconds"`
	// State is member, lost (it has no connection, and its lease runs out) or
	// revoked.
	State string `json:"state"`
}

// MemberList is what a supernode's Daemon has beside.
type MemberList interface {
	Members() []Member
	// Revoke ends a node's membership for good; Allow takes that back.
	Revoke(id string) error
	Allow(id string) error
}

// memberRequest names a node.
type memberRequest struct {
	ID string `json:"id"`
}

// serveMembers adds what a supernode answers; other daemons say that they are none.
func serveMembers(mux *http.ServeMux, d Daemon) {
	list, ok := d.(MemberList)
	if !ok {
		mux.HandleFunc("/v1/members", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "this is a node: the list of members is the supernode's, so ask there, or name its socket with --control", http.StatusNotFound)
		})
		return
	}
	mux.HandleFunc("GET /v1/members", func(w http.ResponseWriter, _ *http.Request) { answer(w, list.Members(), nil, 0) })
	for name, do := range map[string]func(string) error{"revoke": list.Revoke, "allow": list.Allow} {
		mux.HandleFunc("POST /v1/members/"+name, change(func(_ context.Context, req memberRequest) (struct{}, error) { return struct{}{}, do(req.ID) }))
	}
}

// Members asks a supernode for its list.
func (c Client) Members(ctx context.Context) ([]Member, error) {
	return quickly[[]Member](ctx, c, http.MethodGet, "/v1/members", nil)
}

// Revoke has a supernode end a node's membership for good.
func (c Client) Revoke(ctx context.Context, id string) error {
	return c.changeMember(ctx, "revoke", id)
}

// Allow takes a Revoke back.
func (c Client) Allow(ctx context.Context, id string) error {
	return c.changeMember(ctx, "allow", id)
}

func (c Client) changeMember(ctx context.Context, how, id string) error {
	_, err := quickly[any](ctx, c, http.MethodPost, "/v1/members/"+how, memberRequest{id})
	if errors.Is(err, io.EOF) { // a daemon of an earlier version answers nothing
		return nil
	}
	return err
}
