package control

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// State is how a node does, and what has happened to its images lately. It is small, and
// made without a look at disks or images, so that it may be asked for every few seconds.
type State struct {
	Version string `json:"version"`
	// NoSupernode says why no supernode serves this node now; empty: one does.
	NoSupernode string `json:"no_supernode,omitempty"`
	// Called is when containerd has called the snapshotter last; zero: not since the node
	// was started. containerd's CRI plugin calls every 10 seconds if its snapshotter is
	// this one and has a snapshot.
	Called time.Time `json:"called,omitzero"`
	// Notices are those after the number that was asked for, the newest last.
	Notices []Notice `json:"notices"`
	// Last is the number of the newest notice that there has been, and what to ask for
	// next.
	Last uint64 `json:"last"`
}

// Notice is something that happened to an image and that its users may want to know.
type Notice struct {
	// Number grows, from one process of a node to the next as well.
	Number uint64    `json:"number"`
	At     time.Time `json:"at"`
	What   What      `json:"what"`
	// Refs are the images that it is about. Of a layer, all that have it.
	Refs []string `json:"refs"`
	// Layer is the DiffID if it is about one layer.
	Layer string `json:"layer,omitempty"`
	// Cause is that of NotLazy, and Why says it in full.
	Cause string `json:"cause,omitempty"`
	Why   string `json:"why,omitempty"`
	// Before is how often the same has happened since the notice before this one, without
	// a notice of its own.
	Before int `json:"before,omitempty"`
}

// What is a kind of Notice.
type What string

// The kinds.
const (
	Lazy        What = "lazy"        // an image was pulled, and is lazy
	Unpacked    What = "not_lazy"    // an image was pulled, and containerd unpacks it
	Quarantined What = "quarantined" // a layer's bytes are not what its image says
	ReadFailed  What = "read_failed" // a process got EIO
)

// Stateful is what a node's Daemon has beside.
type Stateful interface {
	// State has the notices after the one of this number; those that are remembered.
	State(after uint64) State
}

// serveState adds what a node answers; other daemons say that they are none.
func serveState(mux *http.ServeMux, d Daemon) {
	mux.HandleFunc("GET /v1/state", func(w http.ResponseWriter, r *http.Request) {
		n, ok := d.(Stateful)
		if !ok {
			http.Error(w, "this is a supernode: only a node has a state; name its socket with --control", http.StatusNotFound)
			return
		}
		after, err := strconv.ParseUint(r.URL.Query().Get("after"), 10, 64)
		if err != nil {
			http.Error(w, "request: after: "+err.Error(), http.StatusBadRequest)
			return
		}
		answer(w, n.State(after), nil, 0)
	})
}

// State asks a node how it does. after is Last of the answer before; 0: all notices that
// it remembers.
func (c Client) State(ctx context.Context, after uint64) (*State, error) {
	return quickly[*State](ctx, c, http.MethodGet, fmt.Sprintf("/v1/state?after=%d", after), nil)
}
