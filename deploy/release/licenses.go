package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
)

var (
	licenseName = regexp.MustCompile(`(?i)^((un)?licen[sc]e|copying|copyright)([._-].*)?$`)
	noticeName  = regexp.MustCompile(`(?i)^(notice|patents)([._-].*)?$`)
)

// goPackage is a package, and the module of this repository from which go finds it.
type goPackage struct{ Module, Package string }

// listed is what `go list` says of a package.
type listed struct {
	Dir    string
	Module *struct { // nil in the standard library
		debug.Module
		Dir string
	}
}

// legalFiles are the license of shoal and those of all that the packages link, below
// a prefix, in the order of their names.
func legalFiles(ctx context.Context, src *source, p platform, packages []goPackage) ([]entry, error) {
	own, err := os.ReadFile(src.in("LICENSE"))
	if err != nil {
		return nil, err
	}
	others, err := licenses(ctx, src, p, packages)
	if err != nil {
		return nil, fmt.Errorf("licenses: %w", err)
	}
	return []entry{
		{Name: "share/doc/shoal/LICENSE", Mode: 0o644, Data: own},
		{Name: "share/doc/shoal/THIRD-PARTY-LICENSES", Mode: 0o644, Data: others},
	}, nil
}

// licenses returns all license texts and notices of the modules that are linked into
// packages, and of Go's standard library: those at the top of a module, and those in
// the folders of packages that are linked. A text that several have is there once.
func licenses(ctx context.Context, src *source, p platform, packages []goPackage) ([]byte, error) {
	files := map[string]string{} // where each file is from, by its path
	seen := map[string]bool{}    // folders
	for _, in := range packages {
		dir := src.in(in.Module)
		golang, err := goOutput(ctx, p, dir, "env", "GOROOT", "GOVERSION")
		if err != nil {
			return nil, err
		}
		goRoot, goVersion, _ := strings.Cut(strings.TrimSpace(string(golang)), "\n")
		list, err := goOutput(ctx, p, dir, "list", "-tags=", "-deps", "-json=Dir,Module", in.Package)
		if err != nil {
			return nil, err
		}
		for decoder := json.NewDecoder(bytes.NewReader(list)); ; {
			var l listed
			if err := decoder.Decode(&l); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return nil, fmt.Errorf("go list %s: %w", in.Package, err)
			}
			module, top := "Go "+strings.TrimPrefix(goVersion, "go"), goRoot
			if l.Module != nil {
				path, version := used(src, &l.Module.Module)
				module, top = path+" "+version, l.Module.Dir
			}
			if rel, err := filepath.Rel(src.Root, top); err == nil && filepath.IsLocal(rel) {
				continue // a module of this repository
			}
			if err := findLicenses(files, seen, l.Dir, top, module); err != nil {
				return nil, err
			}
		}
	}
	return joinLicenses(files)
}

// findLicenses adds the files of a package's folder and of the folders above it, up
// to the top of its module, which has to have a license.
func findLicenses(files map[string]string, seen map[string]bool, dir, top, module string) error {
	for ; !seen[dir]; dir = filepath.Dir(dir) {
		seen[dir] = true
		all, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		licensed := false
		for _, f := range all {
			name := f.Name()
			isLicense := licenseName.MatchString(name)
			if !f.Type().IsRegular() || filepath.Ext(name) == ".go" || !isLicense && !noticeName.MatchString(name) {
				continue
			}
			licensed = licensed || isLicense
			path := filepath.Join(dir, name)
			rel, err := filepath.Rel(top, path)
			if err != nil {
				return err
			}
			files[path] = module + ": " + rel
		}
		if dir == top {
			if !licensed {
				return fmt.Errorf("%s is linked, and %s has no file named LICENSE, COPYING or COPYRIGHT: a release needs the text", module, dir)
			}
			return nil
		}
	}
	return nil
}

// joinLicenses writes each text below the files that have it.
func joinLicenses(files map[string]string) ([]byte, error) {
	from := map[string][]string{}
	for path, name := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		// An editor's carriage returns and empty lines make no other text.
		key := strings.TrimSpace(strings.ReplaceAll(string(text), "\r\n", "\n"))
		from[key] = append(from[key], name)
	}
	for _, names := range from {
		slices.Sort(names)
	}
	texts := slices.SortedFunc(maps.Keys(from), func(a, b string) int {
		return strings.Compare(from[a][0], from[b][0])
	})
	const line = "\n================================================================================\n"
	var all bytes.Buffer
	all.WriteString("The programs of shoal contain the Go modules below. Each text counts for the files\n" +
		"that are named above it. `go mod download -json MODULE@VERSION` gets a module's source.\n")
	for _, text := range texts {
		all.WriteString(line + strings.Join(from[text], "\n") + "\n" + line[1:] + "\n" + text + "\n")
	}
	return all.Bytes(), nil
}
