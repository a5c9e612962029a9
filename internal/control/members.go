package control

import (
	"bytes"
	"context"
	"encoding/json"
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
	mux.HandleFunc("GET /v1/members", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(list.Members()) // a client that went away needs no answer
	})
	change := func(do func(string) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			var req memberRequest
			err := json.NewDecoder(io.LimitReader(r.Body, 4<<10)).Decode(&req)
			if err == nil {
				err = do(req.ID)
			}
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
			}
		}
	}
	mux.HandleFunc("POST /v1/members/revoke", change(list.Revoke))
	mux.HandleFunc("POST /v1/members/allow", change(list.Allow))
}

// Members asks a supernode for its list.
func (c Client) Members(ctx context.Context) ([]Member, error) {
	var list []Member
	err := c.quickly(ctx, http.MethodGet, "/v1/members", nil, func(r io.Reader) error { return json.NewDecoder(r).Decode(&list) })
	return list, err
}

// Revoke has a supernode end a node's membership for good.
func (c Client) Revoke(ctx context.Context, id string) error {
	return c.change(ctx, "/v1/members/revoke", id)
}

// Allow takes a Revoke back.
func (c Client) Allow(ctx context.Context, id string) error {
	return c.change(ctx, "/v1/members/allow", id)
}

func (c Client) change(ctx context.Context, path, id string) error {
	body, err := json.Marshal(memberRequest{id})
	if err != nil {
		return err
	}
	return c.quickly(ctx, http.MethodPost, path, bytes.NewReader(body), func(io.Reader) error { return nil })
}
