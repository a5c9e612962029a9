package watch

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"github.com/shoalfs/shoal/internal/control"
)

// Shoal is the shoal node of this machine.
type Shoal interface {
	// State returns how the node does, and what has happened after the notice of this
	// number.
	State(ctx context.Context, after uint64) (*control.State, error)
}

// Config is what New needs. Client, Shoal, Node and Log are required; Defaults has the
// rest.
type Config struct {
	Client typedcorev1.CoreV1Interface
	Shoal  Shoal
	// Node is the name of the Kubernetes node.
	Node string
	Log  *slog.Logger
	// Poll is how often the shoal node is asked.
	Poll time.Duration
	// Grace is how long the shoal node may be away before the condition says so.
	Grace time.Duration
	// Heartbeat is how often a condition that has not changed is written again, on average.
	Heartbeat time.Duration
	// Taint wants a taint while pods cannot start, after TaintAfter.
	Taint      bool
	TaintAfter time.Duration
}

// Defaults returns a Config without what is required.
func Defaults() Config {
	return Config{Poll: 5 * time.Second, Grace: 20 * time.Second, Heartbeat: 10 * time.Minute, TaintAfter: time.Minute}
}

// Component is what events say that they come from.
const Component = "shoal"

// fresh is how old a notice may be that was made before this process. A process that was
// restarted must not tell all again.
const fresh = time.Minute

// Watch is made by New.
type Watch struct {
	cfg Config
	log *slog.Logger

	node      object
	steady    steady
	said      *verdict  // what the condition says; nil: what an earlier process has said
	beat      time.Time // when it is said again
	changes   *rate.Limiter
	condition backoff

	stopped time.Time // since when pods cannot start; zero: they can
	tainted *bool     // nil: that is not known
	taint   backoff

	teller teller
	after  uint64 // the notice that was told last; 0: none yet
	lists  *rate.Limiter
	events backoff
}

// New returns a Watch that has not begun.
func New(cfg Config) (*Watch, error) {
	switch {
	case cfg.Client == nil || cfg.Shoal == nil || cfg.Node == "" || cfg.Log == nil:
		return nil, errors.New("watch: Client, Shoal, Node and Log must be set")
	case cfg.Poll <= 0 || cfg.Grace < 0 || cfg.Heartbeat <= 0 || cfg.TaintAfter < 0:
		return nil, errors.New("watch: --heartbeat must be positive, and --grace and --taint-after must not be negative")
	}
	return &Watch{
		cfg: cfg, log: cfg.Log, node: object{client: cfg.Client, name: cfg.Node}, steady: steady{grace: cfg.Grace},
		changes: rate.NewLimiter(rate.Every(time.Minute), 5),
		teller:  teller{client: cfg.Client, node: cfg.Node, log: cfg.Log},
		lists:   rate.NewLimiter(rate.Every(10*time.Second), 3),
	}, nil
}

// Run watches until ctx ends. What it has written stays: the program that is started next
// goes on with it.
func (w *Watch) Run(ctx context.Context) error {
	w.log.Info("watching the shoal node", "node", w.cfg.Node, "heartbeat", w.cfg.Heartbeat, "taint", w.cfg.Taint)
	events := record.NewBroadcaster(record.WithContext(ctx))
	defer events.Shutdown()
	events.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: w.cfg.Client.Events("")})
	w.teller.recorder = events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: Component, Host: w.cfg.Node})
	tick := time.NewTicker(w.cfg.Poll)
	defer tick.Stop()
	for {
		w.step(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// step asks once, and writes what has changed.
func (w *Watch) step(ctx context.Context) {
	st, err := w.cfg.Shoal.State(ctx, w.after)
	if ctx.Err() != nil {
		return
	}
	now := time.Now()
	v := judge(st, err, now)
	w.say(ctx, v, now)
	if w.cfg.Taint {
		w.keepOff(ctx, v, now)
	}
	if err == nil {
		w.tell(ctx, st, now)
	}
}

// tell writes events for what is new. What cannot be told now is asked for again.
func (w *Watch) tell(ctx context.Context, st *control.State, now time.Time) {
	notices := st.Notices
	if w.after == 0 {
		notices = slices.DeleteFunc(notices, func(n control.Notice) bool { return now.Sub(n.At) > fresh })
	}
	if len(notices) > 0 {
		if !w.events.ready(now) || !w.lists.AllowN(now, 1) {
			return
		}
		if err := w.teller.tell(ctx, notices); err != nil {
			if ctx.Err() == nil {
				w.log.Warn("cannot write events for pods; trying again", "after", w.events.failed(now), "error", err)
			}
			return
		}
		w.events.worked()
	}
	w.after = st.Last
}

// say writes the condition if it has changed, or if its heartbeat is due.
func (w *Watch) say(ctx context.Context, v verdict, now time.Time) {
	say := w.steady.next(v, now)
	changed := say != nil && (w.said == nil || !say.same(*w.said))
	if say == nil || !changed && now.Before(w.beat) || !w.condition.ready(now) || changed && !w.changes.AllowN(now, 1) {
		return
	}
	if err := w.node.say(ctx, *say, now); err != nil {
		if ctx.Err() == nil {
			w.log.Warn("cannot write the condition of the Kubernetes node; trying again", "after", w.condition.failed(now), "error", err)
		}
		return
	}
	w.condition.worked()
	if changed {
		w.log.Info("the condition of the Kubernetes node has changed", "status", say.status, "reason", say.reason, "message", say.message)
	}
	w.said = say
	// Watches that began at the same time are apart from the first heartbeat on.
	w.beat = now.Add(w.cfg.Heartbeat/2 + rand.N(w.cfg.Heartbeat))
}

// keepOff keeps pods off the node while they cannot start.
func (w *Watch) keepOff(ctx context.Context, v verdict, now time.Time) {
	want := false
	switch {
	case v.starts:
		w.stopped = time.Time{}
	case w.stopped.IsZero():
		w.stopped = now
		return
	case now.Sub(w.stopped) < w.cfg.TaintAfter:
		return // a taint that is there stays until pods start
	default:
		want = true
	}
	if w.tainted != nil && *w.tainted == want || !w.taint.ready(now) {
		return
	}
	changed, err := w.node.taint(ctx, want)
	if err != nil {
		if ctx.Err() == nil {
			w.log.Warn("cannot write the taint of the Kubernetes node; trying again", "after", w.taint.failed(now), "error", err)
		}
		return
	}
	w.taint.worked()
	w.tainted = &want
	if changed {
		w.log.Info("the taint of the Kubernetes node has changed", "taint", TaintKey, "there", want)
	}
}

const (
	firstPause = 5 * time.Second
	lastPause  = 5 * time.Minute
)

// backoff says when what has failed may be tried again.
type backoff struct {
	pause time.Duration // before the next try
	until time.Time
}

func (b *backoff) ready(now time.Time) bool { return !now.Before(b.until) }

func (b *backoff) worked() { *b = backoff{} }

// failed returns how long to wait: a time that doubles, and is another one on each node.
func (b *backoff) failed(now time.Time) time.Duration {
	b.pause = min(max(2*b.pause, firstPause), lastPause)
	wait := b.pause/2 + rand.N(b.pause)
	b.until = now.Add(wait)
	return wait
}
