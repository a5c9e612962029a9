package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/credentials"
)

func newPrefetchCommand() *cobra.Command {
	var socket, dockerConfig string
	var local bool
	cmd := &cobra.Command{
		Use:   "prefetch IMAGE...",
		Short: "Bring images to the supernode, or with --local to this node",
		Long: `Prefetch brings images nearby before a container needs them. The daemon on this
machine fetches them to the supernode, so that any node starts them at once, and
with --local to this node's own disk, too. It ends when every byte has been
verified and, with --local, every layer has been proven to be what the image
config says.

A private image needs a credential: the daemon's own, or with --docker-config the
one in a config.json of docker, which the daemon uses for this image and does not
store.`,
		Example: `  shoal prefetch docker.io/library/redis:7
  shoal prefetch --local registry.example.com/app:v2
  shoal prefetch --local --docker-config /run/secrets/pull registry.example.com/private:v2`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("no image is given: name one or more, as in shoal prefetch docker.io/library/redis:7")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			client := controlClient(socket)
			var errs []error
			for _, ref := range args {
				cred, err := credentialIn(cmd.Context(), dockerConfig, ref)
				if err == nil {
					req := control.PrefetchRequest{Ref: ref, Local: local, Credential: cred}
					err = prefetch(cmd.Context(), cmd.OutOrStdout(), client, req)
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", ref, err))
				}
			}
			return errors.Join(errs...)
		},
	}
	addControlFlag(cmd, &socket)
	cmd.Flags().BoolVar(&local, "local", false, "bring every byte to this node's disk as well")
	cmd.Flags().StringVar(&dockerConfig, "docker-config", "", "directory of docker's config.json with the credential for the images; empty: the daemon uses its own")
	return cmd
}

// credentialIn is the credential for an image in the config.json of a directory; the zero
// one if dir is empty.
func credentialIn(ctx context.Context, dir, ref string) (image.Credential, error) {
	if dir == "" {
		return image.Credential{}, nil
	}
	name, err := daemon.Normalize(ref)
	if err != nil {
		return image.Credential{}, err
	}
	file := filepath.Join(dir, "config.json")
	if _, err := os.Stat(file); err != nil {
		return image.Credential{}, fmt.Errorf("--docker-config: %w", err)
	}
	cred, err := credentials.NewDockerConfig(ctx, dir, nil).Credential(ctx, name)
	if err == nil && cred == (image.Credential{}) {
		err = fmt.Errorf("%s has no credential for the registry of this image, or is not what docker login writes", file)
	}
	return cred, err
}

// progress shows events; done is called once, at the end.
type progress interface {
	event(control.Event)
	done(error)
}

func prefetch(ctx context.Context, w io.Writer, client control.Client, req control.PrefetchRequest) error {
	var p progress = &lines{w: w, ref: req.Ref, last: map[string]string{}}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p = newBars(ctx, f, req.Ref)
	}
	err := client.Prefetch(ctx, req, p.event)
	p.done(err)
	return err
}

// lines is progress for pipes and logs: a line when a layer enters a stage, and
// one when all is done.
type lines struct {
	w    io.Writer
	ref  string
	last map[string]string // stage by layer
}

func (l *lines) event(e control.Event) {
	if l.last[e.Layer] == e.Stage {
		return
	}
	l.last[e.Layer] = e.Stage
	size := ""
	if e.Total > 0 {
		size = " (" + units.HumanSize(float64(e.Total)) + ")"
	}
	fmt.Fprintf(l.w, "%s %s %s%s\n", l.ref, shortLayer(e.Layer), e.Stage, size)
}

func (l *lines) done(err error) {
	if err == nil {
		fmt.Fprintf(l.w, "%s done\n", l.ref)
	}
}

// bars is progress for a terminal: a bar for each layer.
type bars struct {
	w    io.Writer
	ref  string
	p    *mpb.Progress
	bars map[string]*bar
}

type bar struct {
	*mpb.Bar
	stage atomic.Pointer[string] // the screen is drawn by a goroutine of its own
}

func newBars(ctx context.Context, w io.Writer, ref string) *bars {
	fmt.Fprintln(w, ref)
	return &bars{w: w, ref: ref, p: mpb.NewWithContext(ctx, mpb.WithOutput(w), mpb.WithWidth(40)), bars: map[string]*bar{}}
}

func (b *bars) event(e control.Event) {
	v := b.bars[e.Layer]
	if v == nil {
		v = &bar{}
		v.stage.Store(&e.Stage)
		v.Bar = b.p.AddBar(0,
			mpb.PrependDecorators(
				decor.Name(shortLayer(e.Layer), decor.WCSyncSpaceR),
				decor.Any(func(decor.Statistics) string { return *v.stage.Load() }, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f")))
		b.bars[e.Layer] = v
	}
	v.stage.Store(&e.Stage)
	v.SetTotal(e.Total, false)
	v.SetCurrent(e.Done)
}

func (b *bars) done(err error) {
	for _, v := range b.bars {
		if err == nil {
			v.SetTotal(-1, true) // what is there is all there is
		} else {
			v.Abort(false)
		}
	}
	b.p.Wait()
	if err == nil {
		fmt.Fprintln(b.w, b.ref, "done")
	}
}

// shortLayer is as much of a digest as tells layers apart on a screen.
func shortLayer(digest string) string {
	const n = len("sha256:") + 12
	return digest[:min(n, len(digest))]
}
