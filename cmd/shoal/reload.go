package main

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

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/control"
)

// errRestart is what a change's apply returns if this value needs a restart.
var errRestart = errors.New("needs a restart")

// change is what a running daemon does when one of these keys of its config has
// another value. Whatever apply does, it does as a whole or, with an error, not at all.
type change[C any] struct {
	keys  []string
	apply func(C) error
}

// reloader reads a daemon's config again, and applies what can be changed while the
// daemon runs.
type reloader[C any] struct {
	load    func() (C, error)
	log     *slog.Logger
	hup     chan os.Signal
	changes []change[C]

	mu     sync.Mutex
	counts map[string]any // what the daemon goes by, by key
}

// newReloader takes over SIGHUP, which else ends the process. A signal that comes
// before serve is kept.
func newReloader[C any](running C, load func() (C, error), log *slog.Logger) *reloader[C] {
	r := &reloader[C]{load: load, log: log, hup: make(chan os.Signal, 1), counts: config.Values(running)}
	signal.Notify(r.hup, syscall.SIGHUP)
	return r
}

// on adds a change.
func (r *reloader[C]) on(apply func(C) error, keys ...string) {
	r.changes = append(r.changes, change[C]{keys, apply})
}

// serve reloads at each SIGHUP until ctx ends.
func (r *reloader[C]) serve(ctx context.Context) {
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
func (r *reloader[C]) Reload() (*control.Reloaded, error) {
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
		if errors.Is(err, errRestart) {
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

func (r *reloader[C]) handles(key string) bool {
	return slices.ContainsFunc(r.changes, func(ch change[C]) bool { return slices.Contains(ch.keys, key) })
}

// setLevel is what a change of the log's level does.
func setLevel(level *slog.LevelVar, l slog.Level) error {
	level.Set(l)
	return nil
}

func newReloadCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Read the daemon's config file again, and show which keys have changed",
		Long: `Reload tells the running daemon to read its config file again, as SIGHUP does, and
prints which keys have changed and which of them need a restart. If the file has an
error, then nothing changes.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			done, err := controlClient(socket).Reload(cmd.Context())
			if err != nil {
				return err
			}
			for _, k := range done.Changed {
				fmt.Fprintf(cmd.OutOrStdout(), "changed: %s\n", k)
			}
			for _, k := range done.Restart {
				fmt.Fprintf(cmd.OutOrStdout(), "needs a restart: %s\n", k)
			}
			if len(done.Changed)+len(done.Restart) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing has changed")
			}
			return nil
		},
	}
	addControlFlag(cmd, &socket)
	return cmd
}
