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

// docs are the files that the program writes about itself.
type docs struct {
	man             map[string][]byte
	bash, zsh, fish []byte
}

// writeDocs runs a program for completions and manual pages.
func writeDocs(ctx context.Context, src *source, shoal string) (*docs, error) {
	d := &docs{man: map[string][]byte{}}
	for shell, to := range map[string]*[]byte{"bash": &d.bash, "zsh": &d.zsh, "fish": &d.fish} {
		out, err := exec.CommandContext(ctx, shoal, "completion", shell).Output()
		if err != nil {
			return nil, fmt.Errorf("completions of %s: %w", shell, err)
		}
		*to = out
	}
	dir, err := os.MkdirTemp("", "shoal-man-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	man := exec.CommandContext(ctx, shoal, "man", dir)
	man.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", src.Time.Unix()))
	if out, err := man.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("manual pages: %w\n%s", err, out)
	}
	pages, err := filepath.Glob(filepath.Join(dir, "*.1"))
	if err != nil {
		return nil, err
	}
	for _, p := range pages {
		if d.man[filepath.Base(p)], err = os.ReadFile(p); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// treeLayout says where a kind of installation has its files.
type treeLayout struct {
	Bin string // directory of the program on the machine, for the units
	Zsh string // directory of zsh's completions, below the prefix
}

var (
	// Where the archive is unpacked: systemd, man and the shells look there, too.
	archiveLayout = treeLayout{Bin: "/usr/local/bin", Zsh: "share/zsh/site-functions"}
	debLayout     = treeLayout{Bin: "/usr/bin", Zsh: "share/zsh/vendor-completions"}
	rpmLayout     = treeLayout{Bin: "/usr/bin", Zsh: "share/zsh/site-functions"}
)

// unitBin is where the units of deploy/ have the program.
const unitBin = "/usr/local/bin/"

// tree is what is installed below a prefix, in the order of its names.
func tree(src *source, b built, d *docs, l treeLayout) ([]entry, error) {
	var all []entry
	for _, p := range b.Programs {
		if !p.Image {
			all = append(all, entry{Name: "bin/" + p.Name, Mode: 0o755, From: p.File})
		}
	}
	units, err := filepath.Glob(src.in("deploy", "*.service"))
	if err != nil {
		return nil, err
	}
	for _, path := range units {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		unit := filepath.Base(path)
		if !bytes.Contains(text, []byte("ExecStart="+unitBin+"shoal ")) {
			return nil, fmt.Errorf("deploy/%s does not start %sshoal", unit, unitBin)
		}
		text = bytes.ReplaceAll(text, []byte(unitBin), []byte(l.Bin+"/"))
		all = append(all, entry{Name: "lib/systemd/system/" + unit, Mode: 0o644, Data: text})
	}
	all = append(all, entry{Name: "share/bash-completion/completions/shoal", Mode: 0o644, Data: d.bash})
	all = append(all, b.Legal...)
	all = append(all, entry{Name: "share/fish/vendor_completions.d/shoal.fish", Mode: 0o644, Data: d.fish})
	for _, name := range sortedKeys(d.man) {
		all = append(all, entry{Name: "share/man/man1/" + name, Mode: 0o644, Data: d.man[name]})
	}
	return append(all, entry{Name: l.Zsh + "/_shoal", Mode: 0o644, Data: d.zsh}), nil
}

// withDirectories puts each directory before what is in it.
func withDirectories(files []entry) []entry {
	var all []entry
	seen := map[string]bool{}
	for _, f := range files {
		parts := strings.SplitAfter(f.Name, "/")
		for i := range parts[:len(parts)-1] {
			dir := strings.Join(parts[:i+1], "")
			if !seen[dir] {
				seen[dir] = true
				all = append(all, entry{Name: dir, Mode: 0o755})
			}
		}
		if !strings.HasSuffix(f.Name, "/") {
			all = append(all, f)
		}
	}
	return all
}
