package main

import (
	"bytes"
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
	// Legal are the license files of what machines install, and ImageLegal those of
	// the image, which has more in it.
	Legal, ImageLegal []entry
}

// program is an executable file.
type program struct {
	goPackage
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
		var packages, inImage []goPackage
		for _, p := range []program{
			{Name: "shoal", goPackage: goPackage{".", "./cmd/shoal"}},
			{Name: "shoal-kube", goPackage: goPackage{"cmd/shoal-kube", "."}, Image: true},
		} {
			p.File = filepath.Join(dir, p.Name)
			if err := buildProgram(ctx, src, b.platform, p); err != nil {
				return nil, err
			}
			b.Programs = append(b.Programs, p)
			inImage = append(inImage, p.goPackage)
			if !p.Image {
				packages = append(packages, p.goPackage)
			}
		}
		var err error
		if b.Legal, err = legalFiles(ctx, src, b.platform, packages); err != nil {
			return nil, err
		}
		if b.ImageLegal, err = legalFiles(ctx, src, b.platform, append(inImage, rootCertificatesFrom)); err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	return all, nil
}

// buildProgram builds a program, statically. The oldest processors of each
// architecture run it. It has the version and nothing else of git, so that a clone, a
// work tree and an archive of a commit give the same bytes.
func buildProgram(ctx context.Context, src *source, p platform, prog program) error {
	_, err := goOutput(ctx, p, src.in(prog.Module), "build", "-trimpath", "-buildvcs=false", "-tags=",
		"-ldflags=-s -w -X main.version="+src.Version, "-o", prog.File, prog.Package)
	return err
}

// goOutput returns what a go command prints, in the folder of a module, for a platform.
func goOutput(ctx context.Context, p platform, dir string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+p.OS, "GOARCH="+p.Arch,
		"GOAMD64=v1", "GOARM64=v8.0", "GOFLAGS=-trimpath", "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s in %s for %s: %w\n%s", strings.Join(args, " "), dir, p, err, stderr.Bytes())
	}
	return out, nil
}
