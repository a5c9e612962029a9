package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
)

// control asks the node's control socket, as `shoal status` does, without the
// processor time that starting a program takes: benchmarks ask many nodes many
// times. The caller closes the body.
func (n *Node) control(ctx context.Context, path string) (*http.Response, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.Control)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://node"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", path, resp.Status)
		_ = resp.Body.Close()
	}
	return resp, err
}

// Status is what `shoal status --output json` prints.
func (n *Node) Status(ctx context.Context) (*NodeStatus, error) {
	resp, err := n.control(ctx, "/v1/status")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var st NodeStatus
	return &st, json.NewDecoder(resp.Body).Decode(&st)
}

// Local returns how many bytes of an image are on the node's disk, synced, and how
// many it has; 0 of 0 as long as the node does not know it.
func (n *Node) Local(ctx context.Context, ref string) (local, size int64, err error) {
	st, err := n.Status(ctx)
	if err != nil {
		return 0, 0, err
	}
	for _, im := range st.Images {
		if im.Ref != ref {
			continue
		}
		for _, l := range im.Layers {
			local, size = local+l.Local, size+l.Size
		}
	}
	return local, size, nil
}
