package exchange

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/blockdev/turns"
	"github.com/shoalfs/shoal/internal/defaults"
)

// Limits bound what peers can make a server do. The zero value of each field
// stands for its default.
type Limits struct {
	// Requests that are worked on at the same time; more are answered busy.
	DemandPerPeer, StartupPerPeer, PrefetchPerPeer, ImagesPerPeer, DocumentsPerPeer int // 64, 8, 16, 8, 16
	Demand, Startup, Prefetch, Images, Documents                                    int // 2048, 1024, 1024, 1024, 512
	// Waiting is how many requests for images, and as many for documents, are known at a
	// time, most of them waiting for a registry (16384). Images and Documents bound those
	// whose answer is being sent. Where opening an image takes memory already, Images and
	// Waiting are the same. Of the requests for documents, those of one registry wait in
	// half of that at most.
	Waiting int
	// Profiles is how many startup profiles are taken at the same time (64), one
	// of each peer.
	Profiles int

	// ReadAhead is how many chunks of one request are read from the store while
	// others are being sent (4), and TotalReadAhead bounds these for all
	// requests together (512). A request always has one chunk in hand.
	ReadAhead, TotalReadAhead int
	// PrefetchReads is how many chunks are read from Chunks for prefetches
	// and by startup profiles at the same time (32). A Provider bounds this itself.
	PrefetchReads int

	// DemandBacklog and PrefetchBacklog are how long a request may have to wait for
	// the upload budget (100 ms and 1 s, the latter for startup, too): one that would
	// wait for longer is answered busy. A node's peers have others to ask; a
	// supernode, of which there may be one, has them wait.
	DemandBacklog, PrefetchBacklog time.Duration

	// IdleTimeout closes streams on which no request comes (2 min). It is
	// longer than a client keeps them.
	IdleTimeout time.Duration
	// WriteTimeout is how long a client may take to accept one chunk (30 s).
	WriteTimeout time.Duration
	// ChunkTimeout is how long the store may take for one chunk (30 s).
	ChunkTimeout time.Duration
	// WorkingInterval is how often a client that waits for an index or a manifest
	// hears that the work goes on (5 s), and ProgressInterval how often,
	// at most, how far the layers are, if it wants to know (500 ms).
	WorkingInterval, ProgressInterval time.Duration
	// FirstSign is after what time such a client is told so first (200 ms): it may ask
	// another server if this one seems to be away.
	FirstSign time.Duration
	// DemandPause is how long a prefetch waits for the same peer's demand
	// requests before it sends its next chunk anyway (50 ms).
	DemandPause time.Duration
	// StartupPause is the same for chunks by a startup profile (5 ms): a container that
	// starts is about to wait for these, too.
	StartupPause time.Duration
}

func (l *Limits) setDefaults() {
	defaults.Positive(&l.DemandPerPeer, 64)
	defaults.Positive(&l.StartupPerPeer, 8)
	defaults.Positive(&l.PrefetchPerPeer, 16)
	defaults.Positive(&l.ImagesPerPeer, 8)
	defaults.Positive(&l.DocumentsPerPeer, 16)
	defaults.Positive(&l.Demand, 2048)
	defaults.Positive(&l.Startup, 1024)
	defaults.Positive(&l.Prefetch, 1024)
	defaults.Positive(&l.Images, 1024)
	defaults.Positive(&l.Documents, 512)
	defaults.Positive(&l.Waiting, 16384)
	defaults.Positive(&l.Profiles, 64)
	defaults.Positive(&l.ReadAhead, 4)
	defaults.Positive(&l.TotalReadAhead, 512)
	defaults.Positive(&l.PrefetchReads, 32)
	defaults.Positive(&l.DemandBacklog, 100*time.Millisecond)
	defaults.Positive(&l.PrefetchBacklog, time.Second)
	defaults.Positive(&l.IdleTimeout, 2*time.Minute)
	defaults.Positive(&l.WriteTimeout, 30*time.Second)
	defaults.Positive(&l.ChunkTimeout, 30*time.Second)
	defaults.Positive(&l.WorkingInterval, 5*time.Second)
	defaults.Positive(&l.FirstSign, 200*time.Millisecond)
	defaults.Positive(&l.ProgressInterval, 500*time.Millisecond)
	defaults.Positive(&l.DemandPause, 50*time.Millisecond)
	defaults.Positive(&l.StartupPause, 5*time.Millisecond)
}

// ServerConfig says what a Server serves.
type ServerConfig struct {
	// Chunks or Provider is where chunks come from; both nil: no chunk protocol.
	Chunks    Chunks
	Provider  Provider
	Images    Images    // nil: no index protocol
	Documents Documents // nil: no manifest protocol
	Profiles  Profiles  // nil: no profile protocol
	// Upload is the budget for chunks; nil: no limit.
	Upload *pace.Pacer
	Limits Limits
	Log    *slog.Logger // nil: no log
	// Registerer, if not nil, takes the server's metrics.
	Registerer prometheus.Registerer
}

// Server answers requests for chunks, indexes and manifests on a host.
type Server struct {
	host   libp2phost.Host
	cfg    ServerConfig
	log    *slog.Logger
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	admit  *admission
	source Provider
	stats  *serverMetrics

	sendingImages, sendingDocuments *semaphore.Weighted
	// asking shares Limits.Waiting for documents among the registries that they are of.
	asking        *turns.Turns
	prefetchReads *semaphore.Weighted
	readAhead     *semaphore.Weighted
	zstd          decoder
	buffers       Buffers
	writers       sync.Pool // *bufio.Writer

	mu      sync.Mutex
	closed  bool
	streams map[network.Stream]struct{}
	wg      sync.WaitGroup // one for each of streams
}

// NewServer starts to serve on h. Close it before h.
func NewServer(h libp2phost.Host, cfg ServerConfig) (*Server, error) {
	defaults.Log(&cfg.Log)
	cfg.Limits.setDefaults()
	admit := newAdmission(&cfg.Limits)
	stats, err := newServerMetrics(cfg.Registerer, admit, cfg.Upload)
	if err != nil {
		return nil, err
	}
	s := &Server{
		host: h, cfg: cfg, log: cfg.Log, stats: stats,
		admit:            admit,
		source:           cfg.Provider,
		sendingImages:    semaphore.NewWeighted(int64(cfg.Limits.Images)),
		sendingDocuments: semaphore.NewWeighted(int64(cfg.Limits.Documents)),
		asking:           turns.New(int64(cfg.Limits.Waiting), 1),
		prefetchReads:    semaphore.NewWeighted(int64(cfg.Limits.PrefetchReads)),
		readAhead:        semaphore.NewWeighted(int64(cfg.Limits.TotalReadAhead)),
		streams:          make(map[network.Stream]struct{}),
	}
	s.writers.New = func() any { return bufio.NewWriterSize(nil, writeBuffer) }
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if cfg.Chunks != nil {
		s.source = storeProvider{cfg.Chunks}
	}
	if s.source != nil {
		h.SetStreamHandler(ChunkProtocol, s.handler(s.serveChunks))
	}
	if cfg.Images != nil {
		h.SetStreamHandler(ImageProtocol, s.handler(s.serveImages))
	}
	if cfg.Documents != nil {
		h.SetStreamHandler(DocumentProtocol, s.handler(s.serveDocuments))
	}
	if cfg.Profiles != nil {
		h.SetStreamHandler(ProfileProtocol, s.handler(s.serveProfiles))
	}
	return s, nil
}

// writeBuffer is the payload of yamux' largest message, so that a full buffer
// goes out as one.
const writeBuffer = 64<<10 - 12

// Close resets all streams and waits until nothing of them is left.
func (s *Server) Close() error {
	if s.source != nil {
		s.host.RemoveStreamHandler(ChunkProtocol)
	}
	if s.cfg.Images != nil {
		s.host.RemoveStreamHandler(ImageProtocol)
	}
	if s.cfg.Documents != nil {
		s.host.RemoveStreamHandler(DocumentProtocol)
	}
	if s.cfg.Profiles != nil {
		s.host.RemoveStreamHandler(ProfileProtocol)
	}
	s.cancel()
	s.mu.Lock()
	s.closed = true
	open := make([]network.Stream, 0, len(s.streams))
	for st := range s.streams {
		open = append(open, st)
	}
	s.mu.Unlock()
	for _, st := range open {
		_ = st.Reset()
	}
	s.wg.Wait()
	s.stats.Unregister()
	return nil
}

// handler runs serve for each stream and makes sure that the stream is gone
// afterwards: closed if serve returned nil, else reset.
func (s *Server) handler(serve func(network.Stream) error) network.StreamHandler {
	return func(st network.Stream) {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			_ = st.Reset()
			return
		}
		s.streams[st] = struct{}{}
		s.wg.Add(1)
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			delete(s.streams, st)
			s.mu.Unlock()
			s.wg.Done()
		}()
		err := serve(st)
		if err == nil {
			err = st.Close()
		}
		if err != nil {
			_ = st.Reset()
			s.log.Debug("stream ended", "peer", st.Conn().RemotePeer(), "protocol", st.Protocol(), "error", err)
		}
	}
}

// byteReader reads single bytes from a stream. Requests are a few hundred bytes
// and streams idle most of the time, so a buffer for each would be waste.
type byteReader struct {
	io.Reader
	one [1]byte
}

func (r *byteReader) ReadByte() (byte, error) {
	for {
		n, err := r.Read(r.one[:])
		if n == 1 {
			return r.one[0], nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// isEnd says whether a read error is a stream's ordinary end.
func isEnd(err error) bool { return errors.Is(err, io.EOF) }
