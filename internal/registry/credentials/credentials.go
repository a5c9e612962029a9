// Package credentials finds a node's credentials for registries.
//
// # Invariants
//
//   - Files and helper programs are read again at each request, so that a rotated
//     credential counts at once. Nothing is stored.
//   - A secret is in no error and in no log line.
package credentials

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/service/keychain/dockerconfig"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	dockercli "github.com/docker/cli/cli/config"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/image"
)

// DockerConfig takes credentials from docker's config.json: auths, credsStore and
// credHelpers. It is safe for use by several goroutines.
type DockerConfig struct {
	keychain resolver.Credential
	log      *slog.Logger
	running  chan struct{} // bounds helper programs, which may hang

	mu     sync.Mutex
	broken error // why config.json counted as empty at the last look-up
}

// maxRunning is how many look-ups may be under way.
const maxRunning = 16

// NewDockerConfig reads config.json in dir; an empty dir is $DOCKER_CONFIG, and
// where that is not set ~/.docker, as docker does it. Docker's library has one
// directory per process: the last call with a dir decides for all. log may be nil.
func NewDockerConfig(ctx context.Context, dir string, log *slog.Logger) *DockerConfig {
	if dir != "" {
		dockercli.SetDir(dir)
	}
	defaults.Log(&log)
	return &DockerConfig{keychain: dockerconfig.NewDockerconfigKeychain(ctx), log: log, running: make(chan struct{}, maxRunning)}
}

// Explain adds to an error that wraps blockdev.ErrUnauthorized that config.json
// cannot be read, if that is so. Other errors, and nil, come back as they are.
func (d *DockerConfig) Explain(err error) error {
	d.mu.Lock()
	broken := d.broken
	d.mu.Unlock()
	if broken == nil || !errors.Is(err, blockdev.ErrUnauthorized) {
		return err
	}
	return fmt.Errorf("%w (and no credential was sent: %w)", err, broken)
}

// check reads config.json, as the keychain will do, to find out whether it can.
// It counts as empty if not: what is public needs no credential. The file's own
// words are not in the error, as they could hold anything.
func (d *DockerConfig) check() bool {
	_, err := dockercli.Load("")
	if err != nil {
		err = fmt.Errorf("%s/config.json cannot be read or is not what docker login writes: repair it, or remove it", dockercli.Dir())
	}
	d.mu.Lock()
	news := err != nil && d.broken == nil
	d.broken = err
	d.mu.Unlock()
	if news {
		d.log.Error("docker's config.json is broken; every registry is asked without a credential until you repair the file", "error", err)
	}
	return err == nil
}

// Credential returns the credential for the registry host of an image reference;
// the zero value if there is none, or no config.json. A config.json that does not
// parse counts as none; that is logged once, and Explain says it where it matters.
// Errors are those of the reference, of a helper program, or of ctx.
func (d *DockerConfig) Credential(ctx context.Context, ref string) (image.Credential, error) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return image.Credential{}, fmt.Errorf("image reference %q: %w", ref, err)
	}
	host := spec.Hostname()
	if host == "index.docker.io" {
		host = "docker.io"
	}
	type result struct {
		user, secret string
		err          error
	}
	// A helper program cannot be told to stop; it must not hold up a pull.
	select {
	case d.running <- struct{}{}:
	case <-ctx.Done():
		return image.Credential{}, fmt.Errorf("%d docker credential helpers hang: %w", maxRunning, ctx.Err())
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-d.running }()
		var r result
		if d.check() {
			r.user, r.secret, r.err = d.keychain(host, spec)
		}
		done <- r
	}()
	select {
	case <-ctx.Done():
		return image.Credential{}, fmt.Errorf("docker credential helper for %s does not answer: %w", host, ctx.Err())
	case r := <-done:
		if r.err != nil {
			// The helper's own words could hold anything.
			return image.Credential{}, fmt.Errorf("docker config for %s: %w", host, errHelper)
		}
		return image.Credential{Username: r.user, Secret: r.secret}, nil
	}
}

// errHelper stands for whatever a helper program complained about.
var errHelper = errors.New("its credential helper failed (try docker-credential-NAME get by hand)")
