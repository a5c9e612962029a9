package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// Metric returns a Prometheus metric's value from a daemon's metrics address,
// summed over its labels; name may have labels of its own, all of them and in the
// order they are printed.
func Metric(ctx context.Context, addr, name string) (float64, error) {
	return metric(ctx, http.DefaultClient, addr, name)
}

// Metric is Metric for a supernode on any machine of the lab.
func (s *Supernode) Metric(ctx context.Context, name string) (float64, error) {
	return metric(ctx, s.lab.client(), s.Metrics, name)
}

// Metric is Metric for a node on any machine of the lab.
func (n *Node) Metric(ctx context.Context, name string) (float64, error) {
	return metric(ctx, n.lab.client(), n.Metrics, name)
}

// Series returns a metric of the node by its labels, as they are printed.
func (n *Node) Series(ctx context.Context, name string) (map[string]float64, error) {
	return series(ctx, n.lab.client(), n.Metrics, name)
}

// Probe asks for a path at the address of the metrics, such as /readyz.
func (s *Supernode) Probe(ctx context.Context, path string) (status int, text string, err error) {
	return probe(ctx, s.lab.client(), s.Metrics, path)
}

// Probe is Probe for a node on any machine of the lab.
func (n *Node) Probe(ctx context.Context, path string) (status int, text string, err error) {
	return probe(ctx, n.lab.client(), n.Metrics, path)
}

func probe(ctx context.Context, client *http.Client, addr, path string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), errors.Join(err, resp.Body.Close())
}

// ready returns why the supernode does not serve yet.
func (s *Supernode) ready(ctx context.Context) error {
	status, text, err := s.Probe(ctx, "/readyz")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("not ready: %s", text)
	}
	return err
}

func metric(ctx context.Context, client *http.Client, addr, name string) (float64, error) {
	values, err := series(ctx, client, addr, name)
	var sum float64
	for _, v := range values {
		sum += v
	}
	return sum, err
}

func series(ctx context.Context, client *http.Client, addr, name string) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	values := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || rest == "" || (rest[0] != ' ' && rest[0] != '{') {
			continue
		}
		at := strings.LastIndexByte(rest, ' ')
		if values[rest[:at]], err = strconv.ParseFloat(rest[at+1:], 64); err != nil {
			return nil, fmt.Errorf("metric %s: %w", name, err)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(values) == 0 {
		return nil, fmt.Errorf("http://%s/metrics has no %s", addr, name)
	}
	return values, nil
}
