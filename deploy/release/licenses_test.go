package main

import (
	"debug/buildinfo"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLicenses: each module that the linker has recorded in a program is named, the
// texts of packages below the top are there, and those of what only the image has are
// in the image alone.
func TestLicenses(t *testing.T) {
	src, programs := buildHere(t, work)
	for _, p := range programs[0].Programs {
		legal := programs[0].ImageLegal
		if !p.Image {
			legal = programs[0].Legal
		}
		text := string(legal[1].Data)
		info, err := buildinfo.ReadFile(p.File)
		noError(t, err)
		for _, m := range info.Deps {
			path, version := used(src, m)
			if !strings.Contains(text, "\n"+path+" "+version+": ") && path != "github.com/shoalfs/shoal" {
				t.Errorf("%s: %s %s is not named", p.Name, path, version)
			}
		}
		for _, want := range []string{"\nGo " + strings.TrimPrefix(info.GoVersion, "go") + ": LICENSE\n", ": zstd/internal/xxhash/LICENSE.txt\n", "\ngolang.org/x/crypto/x509roots/fallback "} {
			if strings.Contains(text, want) != (p.Image || !strings.Contains(want, "x509roots")) {
				t.Errorf("%s: %q is there: %v", p.Name, want, strings.Contains(text, want))
			}
		}
		if strings.Contains(text, "github.com/shoalfs/") || strings.Contains(text, ": ../") {
			t.Errorf("%s: a module of this repository is named, or a file outside of its module", p.Name)
		}
	}
}

// TestNoLicense: a module without a license is an error that names the module, and a
// notice alone is not a license.
func TestNoLicense(t *testing.T) {
	root, other := t.TempDir(), t.TempDir()
	for name, text := range map[string]string{
		filepath.Join(root, "go.mod"):     "module example.test/own\n\ngo 1.26\n\nrequire example.test/other v1.2.3\n\nreplace example.test/other => " + other + "\n",
		filepath.Join(root, "main.go"):    "package main\n\nimport _ \"example.test/other/sub\"\n\nfunc main() {}\n",
		filepath.Join(root, "LICENSE"):    "ours\n",
		filepath.Join(other, "go.mod"):    "module example.test/other\n\ngo 1.26\n",
		filepath.Join(other, "NOTICE.md"): "a notice\n",
		filepath.Join(other, "sub/x.go"):  "package sub\n",
	} {
		noError(t, os.MkdirAll(filepath.Dir(name), 0o755))
		noError(t, os.WriteFile(name, []byte(text), 0o644))
	}
	src := &source{Root: root, Version: "v1.2.3"}
	here := platform{OS: "linux", Arch: "amd64"}
	packages := []goPackage{{".", "."}}
	if _, err := legalFiles(t.Context(), src, here, packages); err == nil || !strings.Contains(err.Error(), "example.test/other") {
		t.Errorf("a module without a license: %v", err)
	}
	noError(t, os.WriteFile(filepath.Join(other, "License.txt"), []byte("their license\r\n"), 0o644))
	noError(t, os.WriteFile(filepath.Join(other, "sub/COPYING"), []byte("their license\n\n"), 0o644))
	legal, err := legalFiles(t.Context(), src, here, packages)
	noError(t, err)
	if text := string(legal[1].Data); strings.Count(text, "their license\n") != 1 || strings.Count(text, "a notice\n") != 1 {
		t.Errorf("want each text once:\n%s", text)
	}
}
