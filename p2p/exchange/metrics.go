package exchange

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/internal/metric"
	"github.com/shoalfs/shoal/p2p/wire"
)

// serverMetrics count what a server did. Labels have a handful of values each:
// no peers, no digests.
type serverMetrics struct {
	metric.Set
	requests *prometheus.CounterVec
	chunks   [kinds]prometheus.Counter
	bytes    [kinds]prometheus.Counter
}

func newServerMetrics(reg prometheus.Registerer, admit *admission, upload *pace.Pacer) (*serverMetrics, error) {
	m := &serverMetrics{Set: metric.Set{Registerer: reg}}
	m.requests = metric.CounterVec("shoal_p2p_requests_total", "Requests from peers, by kind and how they ended.", "kind", "result")
	chunks := metric.CounterVec("shoal_p2p_sent_chunks_total", "Chunks sent to peers.", "kind")
	bytes := metric.CounterVec("shoal_p2p_sent_bytes_total", "Bytes of chunks (as sent: compressed or not) and indexes sent to peers.", "kind")
	for k := range kinds {
		m.chunks[k] = chunks.WithLabelValues(k.String())
		m.bytes[k] = bytes.WithLabelValues(k.String())
	}
	uses, waits := map[string]func() blockdev.Use{}, map[string]func() blockdev.Use{}
	for k := range kinds {
		uses[k.String()] = func() blockdev.Use { return admit.use(k) }
	}
	for k, pr := range map[kind]blockdev.Priority{demand: blockdev.Demand, startup: blockdev.Startup, prefetch: blockdev.Prefetch} {
		waits[k.String()] = func() blockdev.Use {
			return blockdev.Use{Waiting: upload.Waiting()[pr], Capacity: upload.Rate()}
		}
	}
	return m, m.Register(m.requests, chunks, bytes,
		metric.Uses("shoal_p2p_places", "Requests from peers that are under way, by kind. A request beyond the capacity is answered busy, so none waits; requests for images and documents count from when they begin to wait for a registry until the answer is sent.", uses),
		metric.Uses("shoal_p2p_upload_bytes", "Bytes of chunks that wait for max_upload, by kind (capacity: bytes a second; 0: no limit).", waits))
}

// request counts one request by the error that it was answered with.
func (m *serverMetrics) request(k kind, err error) {
	result := "ok"
	switch {
	case err == nil:
	case errors.Is(err, wire.ErrBusy):
		result = "busy"
	default:
		result = "error"
	}
	m.requests.WithLabelValues(k.String(), result).Inc()
}
