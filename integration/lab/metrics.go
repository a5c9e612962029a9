package lab

import (
	"bufio"
	"context"
	"fmt"
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

func metric(ctx context.Context, client *http.Client, addr, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var sum float64
	found := false
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		rest, ok := strings.CutPrefix(lines.Text(), name)
		if !ok || rest == "" || (rest[0] != ' ' && rest[0] != '{') {
			continue
		}
		v, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
		if err != nil {
			return 0, fmt.Errorf("metric %s: %w", name, err)
		}
		sum += v
		found = true
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	if !found {
		return 0, fmt.Errorf("http://%s/metrics has no %s", addr, name)
	}
	return sum, nil
}
