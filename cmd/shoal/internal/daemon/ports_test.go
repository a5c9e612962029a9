package daemon

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// syncBuffer is a buffer that a daemon logs to.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) count(word string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.b.String(), word)
}

// TestPorts: a port that somebody else has is served as soon as he lets it go; the
// log says so once, and the metric for as long as it lasts.
func TestPorts(t *testing.T) {
	thief, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := thief.Addr().String()
	reg, log := prometheus.NewRegistry(), &syncBuffer{}
	ports, err := NewPorts(slog.New(slog.NewTextHandler(log, nil)), reg)
	if err != nil {
		t.Fatal(err)
	}
	unbound := func() float64 {
		all, err := reg.Gather()
		if err != nil || len(all) != 1 || len(all[0].Metric) != 1 {
			t.Fatalf("metrics %v, %v", all, err)
		}
		return all[0].Metric[0].GetGauge().GetValue()
	}
	ctx, end := context.WithCancel(t.Context())
	port := ports.Open("mirror_address", addr, TCP(addr))
	if unbound() != 1 || log.count("address already in use") != 1 {
		t.Errorf("the metric says %v, the log:\n%s", unbound(), log.b.String())
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		port.ServeHTTP(ctx, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "mine") }))
	}()
	time.Sleep(firstRebind + firstRebind/2) // another attempt fails
	if n := log.count("address already in use"); n != 1 {
		t.Errorf("the log says %d times that the port is taken", n)
	}
	if err := thief.Close(); err != nil {
		t.Fatal(err)
	}
	body := ""
	for range 1000 {
		if resp, err := http.Get("http://" + addr); err == nil {
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			body = string(b)
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if body != "mine" || unbound() != 0 || log.count("after an attempt that failed") != 1 {
		t.Errorf("%q is served, the metric says %v, the log:\n%s", body, unbound(), log.b.String())
	}
	http.DefaultClient.CloseIdleConnections()
	end()
	<-done

	// One that never can be bound ends with its context.
	never := ports.Open("metrics_address", "192.0.2.1:1", TCP("192.0.2.1:1"))
	ctx, end = context.WithCancel(t.Context())
	end()
	never.ServeHTTP(ctx, nil)
}
