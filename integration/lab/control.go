package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

// control asks the node's control socket, as `shoal status` and `shoal prefetch`
// do, without the processor time that starting a program takes: benchmarks ask
// many nodes many times. The caller closes the body.
func (n *Node) control(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.Control)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s", method, path, resp.Status)
		_ = resp.Body.Close()
	}
	return resp, err
}

// Status is what `shoal status --output json` prints.
func (n *Node) Status(ctx context.Context) (*NodeStatus, error) {
	resp, err := n.control(ctx, http.MethodGet, "/v1/status", nil)
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

// Prefetch is `shoal prefetch --local`: it returns when every byte is on the node's
// disk and every layer is proven.
func (n *Node) Prefetch(ctx context.Context, ref string) error {
	body, err := json.Marshal(map[string]any{"ref": ref, "local": true})
	if err != nil {
		return err
	}
	resp, err := n.control(ctx, http.MethodPost, "/v1/prefetch", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for events := json.NewDecoder(resp.Body); ; {
		var e struct {
			Finished bool
			Error    string
		}
		if err := events.Decode(&e); err != nil {
			return fmt.Errorf("prefetch of %s: %w", ref, err)
		}
		switch {
		case e.Error != "":
			return errors.New(e.Error)
		case e.Finished:
			return nil
		}
	}
}
