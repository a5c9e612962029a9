// Package credentials finds a node's credentials for registries.
//
// # Invariants
//
//   - Files and helper programs are read anew at each request, so that a rotated
//     credential counts at once. Nothing is stored.
//   - A secret is in no error and in no log line.
package credentials

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/service/keychain/dockerconfig"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	dockercli "github.com/docker/cli/cli/config"

	"github.com/shoalfs/shoal/blockdev"
)

// DockerConfig takes credentials from docker's config.json: auths, credsStore and
// credHelpers. It is safe for use by several goroutines.
type DockerConfig struct {
	keychain resolver.Credential
	running  chan struct{} // bounds helper programs, which may hang
}

// maxRunning is how many look-ups may be under way.
const maxRunning = 16

// NewDockerConfig reads config.json in dir; an empty dir is $DOCKER_CONFIG, and
// where that is not set ~/.docker, as docker does it. Docker's library has one
// directory per process: the last call with a dir decides for all.
func NewDockerConfig(ctx context.Context, dir string) *DockerConfig {
	if dir != "" {
		dockercli.SetDir(dir)
	}
	return &DockerConfig{keychain: dockerconfig.NewDockerconfigKeychain(ctx), running: make(chan struct{}, maxRunning)}
}

// Credential returns the credential for the registry host of an image reference;
// the zero value if there is none, or no config.json. A config.json that does not
// parse counts as none, with a log line of the keychain's. Errors are those of the
// reference, of a helper program, or of ctx.
func (d *DockerConfig) Credential(ctx context.Context, ref string) (blockdev.Credential, error) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return blockdev.Credential{}, fmt.Errorf("image reference %q: %w", ref, err)
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
		return blockdev.Credential{}, fmt.Errorf("docker credential helpers hang, %d of them: %w", maxRunning, ctx.Err())
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-d.running }()
		var r result
		r.user, r.secret, r.err = d.keychain(host, spec)
		done <- r
	}()
	select {
	case <-ctx.Done():
		return blockdev.Credential{}, fmt.Errorf("docker credential helper for %s does not answer: %w", host, ctx.Err())
	case r := <-done:
		if r.err != nil {
			// The helper's own words could hold anything.
			return blockdev.Credential{}, fmt.Errorf("docker config for %s: %w", host, errHelper)
		}
		return blockdev.Credential{Username: r.user, Secret: r.secret}, nil
	}
}

// errHelper stands for whatever a helper program complained about.
var errHelper = errors.New("its credential helper failed (try docker-credential-NAME get by hand)")
