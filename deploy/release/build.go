package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// platform is an operating system and an architecture, in Go's words, which are
// those of images, too.
type platform struct{ OS, Arch string }

func (p platform) String() string { return p.OS + "/" + p.Arch }

// built are the programs for one platform.
type built struct {
	platform
	Programs []program
}

// program is an executable file.
type program struct {
	Name string
	File string
	// Image says that it is in the container image alone: machines outside of a
	// cluster have no use for it.
	Image bool
}

// buildAll builds the programs for each platform, below dist.
func buildAll(ctx context.Context, src *source, dist string, platforms []string) ([]built, error) {
	var all []built
	for _, name := range platforms {
		os, arch, ok := strings.Cut(name, "/")
		if !ok || os != "linux" {
			return nil, fmt.Errorf("platform %q: shoal is built for linux/ARCHITECTURE", name)
		}
		b := built{platform: platform{OS: os, Arch: arch}}
		dir := filepath.Join(dist, "programs", os+"_"+arch)
		for _, p := range []struct {
			program
			module, pkg string
		}{
			{program{Name: "shoal"}, ".", "./cmd/shoal"},
			{program{Name: "shoal-kube", Image: true}, "cmd/shoal-kube", "."},
		} {
			p.File = filepath.Join(dir, p.Name)
			if err := buildProgram(ctx, src, b.platform, src.in(p.module), p.pkg, p.File); err != nil {
				return nil, err
			}
			b.Programs = append(b.Programs, p.program)
		}
		all = append(all, b)
	}
	return all, nil
}

// buildProgram builds a package of the module in dir, statically. The oldest
// processors of each architecture run it. It has the version and nothing else of
// git, so that a clone, a work tree and an archive of a commit give the same bytes.
func buildProgram(ctx context.Context, src *source, p platform, dir, pkg, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags=",
		"-ldflags=-s -w -X main.version="+src.Version, "-o", to, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+p.OS, "GOARCH="+p.Arch,
		"GOAMD64=v1", "GOARM64=v8.0", "GOFLAGS=-trimpath", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s for %s: %w\n%s", pkg, p, err, out)
	}
	return nil
}
