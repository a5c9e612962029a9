package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Registry is a real OCI registry (Debian's docker-registry).
type Registry struct {
	*Process
	// Addr is host:port; plain HTTP.
	Addr string

	debug string // host:port of its own metrics
	lab   *Lab
}

// StartRegistry serves the images in storage, a directory that outlives the
// lab. With htpasswd, a file of that format, it asks for a password.
func (l *Lab) StartRegistry(ctx context.Context, name, storage, htpasswd string) (*Registry, error) {
	addr, err := l.freeAddr()
	if err != nil {
		return nil, err
	}
	return l.StartRegistryAt(ctx, name, addr, storage, htpasswd)
}

// StartRegistryAt is StartRegistry at this host:port.
func (l *Lab) StartRegistryAt(ctx context.Context, name, addr, storage, htpasswd string) (*Registry, error) {
	if err := os.MkdirAll(storage, 0o755); err != nil {
		return nil, err
	}
	debug, err := l.freeAddr()
	if err != nil {
		return nil, err
	}
	auth := ""
	if htpasswd != "" {
		auth = fmt.Sprintf("auth:\n  htpasswd:\n    realm: lab\n    path: %s\n", htpasswd)
	}
	cfg, err := l.writeFile(name+"/config.yml", fmt.Sprintf(`version: 0.1
log:
  level: warn
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: %s
  delete:
    enabled: true
http:
  addr: %q
  debug:
    addr: %q
    prometheus:
      enabled: true
%s`, storage, addr, debug, auth))
	if err != nil {
		return nil, err
	}
	r := &Registry{Addr: addr, debug: debug, lab: l}
	return r, r.serve(ctx, name, cfg)
}

// serve starts the program and waits until it answers.
func (r *Registry) serve(ctx context.Context, name, cfg string) (err error) {
	r.Process, err = r.lab.Start(name, "docker-registry", []string{"OTEL_TRACES_EXPORTER=none"}, "serve", cfg)
	if err != nil {
		return err
	}
	return WaitFor(ctx, "registry", 20*time.Second, func() error {
		if err := r.Alive(); err != nil {
			return err
		}
		resp, err := r.lab.client().Get("http://" + r.Addr + "/v2/")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
}

// RestartRegistry starts the registry again on the same storage and address, after
// Stop or Kill.
func (l *Lab) RestartRegistry(ctx context.Context, r *Registry) (*Registry, error) {
	again := *r
	return &again, again.serve(ctx, r.Name, l.Path(r.Name, "config.yml"))
}

// Requests returns how many requests the registry has answered.
func (r *Registry) Requests(ctx context.Context) (int64, error) {
	n, err := metric(ctx, r.lab.client(), r.debug, "registry_http_requests_total")
	return int64(n), err
}

// ImagesDir is where bench/images/build.sh keeps the real images; their registry's
// storage is the directory registry in it.
func ImagesDir() (string, error) {
	cache := os.Getenv("SHOAL_CACHE")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(home, ".cache", "shoal")
	}
	return filepath.Join(cache, "images"), nil
}
