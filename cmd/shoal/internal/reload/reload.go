// Package reload has a running daemon read its config file again, and apply what can be
// changed while it runs.
package reload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"reflect"
	"slices"
	"sync"
	"syscall"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/internal/control"
)

// ErrRestart is returned by what On was given if this value needs a restart.
var ErrRestart = errors.New("needs a restart")

// change is one of On.
type change[C any] struct {
	keys  []string
	apply func(C) error
}

// Reloader reads a daemon's config again, and applies what can be changed while the
// daemon runs.
type Reloader[C any] struct {
	load    func() (C, error)
	log     *slog.Logger
	hup     chan os.Signal
	changes []change[C]

	mu     sync.Mutex
	counts map[string]any // what the daemon goes by, by key
}

// New takes over SIGHUP, which else ends the process. A signal that comes
// before Serve is kept.
func New[C any](running C, load func() (C, error), log *slog.Logger) *Reloader[C] {
	r := &Reloader[C]{load: load, log: log, hup: make(chan os.Signal, 1), counts: config.Values(running)}
	signal.Notify(r.hup, syscall.SIGHUP)
	return r
}

// On adds what the daemon does when one of these keys has another value: as a whole or, with
// an error, not at all.
func (r *Reloader[C]) On(apply func(C) error, keys ...string) {
	r.changes = append(r.changes, change[C]{keys, apply})
}

// Serve reloads at each SIGHUP until ctx ends.
func (r *Reloader[C]) Serve(ctx context.Context) {
	for {
		select {
		case <-r.hup:
			_, _ = r.Reload() // it is in the log
		case <-ctx.Done():
			return
		}
	}
}

// Reload implements control.Reloader.
func (r *Reloader[C]) Reload() (*control.Reloaded, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.load()
	if err != nil {
		r.log.Error("config not reloaded; the old values stay in use", "error", err)
		return nil, fmt.Errorf("config not reloaded, the old values stay in use: %w", err)
	}
	r.log.Debug("config file read")
	values := config.Values(c)
	differs := func(key string) bool { return !reflect.DeepEqual(r.counts[key], values[key]) }
	done := &control.Reloaded{Changed: []string{}, Restart: []string{}}
	var errs []error
	for _, ch := range r.changes {
		keys := slices.DeleteFunc(slices.Clone(ch.keys), func(k string) bool { return !differs(k) })
		if len(keys) == 0 {
			continue
		}
		err := ch.apply(c)
		if errors.Is(err, ErrRestart) {
			done.Restart = append(done.Restart, keys...)
			continue
		}
		if err != nil {
			r.log.Error("cannot apply a change in the config; the old value stays in use", "keys", keys, "error", err)
			errs = append(errs, fmt.Errorf("%v: %w", keys, err))
			continue
		}
		for _, k := range keys {
			r.counts[k] = values[k]
		}
		done.Changed = append(done.Changed, keys...)
	}
	for key := range values {
		if differs(key) && !r.handles(key) {
			done.Restart = append(done.Restart, key)
		}
	}
	slices.Sort(done.Changed)
	slices.Sort(done.Restart)
	if len(done.Restart) > 0 {
		r.log.Warn("changes in the config need a restart; until then the old values stay in use", "keys", done.Restart)
	}
	r.log.Info("config reloaded", "changed", done.Changed)
	return done, errors.Join(errs...)
}

func (r *Reloader[C]) handles(key string) bool {
	return slices.ContainsFunc(r.changes, func(ch change[C]) bool { return slices.Contains(ch.keys, key) })
}
