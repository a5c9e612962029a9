package main

import (
	"archive/tar"
	"compress/gzip"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/xeipuuv/gojsonschema"
)

// work is where all tests have the programs that buildHere builds once.
var work string

func TestMain(m *testing.M) {
	var err error
	if work, err = os.MkdirTemp("", "shoal-release-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	_ = os.RemoveAll(work)
	os.Exit(status)
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// buildHere builds the programs for this machine, below dir.
func buildHere(t *testing.T, dir string) (*source, []built) {
	t.Helper()
	src, err := readSource(t.Context(), "v1.2.3")
	noError(t, err)
	programs, err := buildAll(t.Context(), src, dir, []string{"linux/" + runtime.GOARCH})
	noError(t, err)
	return src, programs
}

// TestReproducible: two runs, which share nothing but the source, give the same
// files with the same bytes, and the checksums are theirs.
func TestReproducible(t *testing.T) {
	var dirs []string
	for _, programs := range []string{work, t.TempDir()} {
		dir := filepath.Join(t.TempDir(), "release")
		t.Setenv("TMPDIR", t.TempDir())
		src, b := buildHere(t, programs)
		noError(t, writeRelease(t.Context(), dir, src, b))
		dirs = append(dirs, dir)
	}
	var names []string
	noError(t, filepath.WalkDir(dirs[0], func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		names = append(names, d.Name())
		a, err := fileSum(path)
		if err != nil {
			return err
		}
		b, err := fileSum(filepath.Join(dirs[1], d.Name()))
		if a != b {
			t.Errorf("%s: two runs differ", d.Name())
		}
		return err
	}))
	base := "shoal_1.2.3_linux_" + runtime.GOARCH
	for _, want := range []string{base + ".tar.gz", base + ".deb", base + ".rpm", base + ".cdx.json", "shoal_1.2.3_image.tar", "shoal-1.2.3.tgz", "checksums.txt"} {
		if !strings.Contains(strings.Join(names, "\n")+"\n", want+"\n") {
			t.Errorf("%s is missing: there are %q", want, names)
		}
	}
	check := exec.CommandContext(t.Context(), "sha256sum", "--check", "--strict", "checksums.txt")
	check.Dir = dirs[0]
	if out, err := check.CombinedOutput(); err != nil || strings.Count(string(out), ": OK") != len(names)-1 {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestArchive: the archive has what a machine needs below /usr/local, owned by root,
// and the program in it runs.
func TestArchive(t *testing.T) {
	src, programs := buildHere(t, work)
	d, err := writeDocs(t.Context(), src, programs[0].Programs[0].File)
	noError(t, err)
	dir := t.TempDir()
	noError(t, writePlatform(dir, src, programs[0], d))
	f, err := os.Open(filepath.Join(dir, "shoal_1.2.3_linux_"+runtime.GOARCH+".tar.gz"))
	noError(t, err)
	defer f.Close()
	gz, err := gzip.NewReader(f)
	noError(t, err)
	prefix := t.TempDir()
	got := map[string]int64{}
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		noError(t, err)
		if h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(src.Time) {
			t.Errorf("%s: owner %d:%d, time %v", h.Name, h.Uid, h.Gid, h.ModTime)
		}
		got[h.Name] = h.Mode
		path := filepath.Join(prefix, h.Name)
		noError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		b, err := io.ReadAll(tr)
		noError(t, err)
		noError(t, os.WriteFile(path, b, fs.FileMode(h.Mode)))
	}
	for name, mode := range map[string]int64{
		"bin/shoal": 0o755, "lib/systemd/system/shoal-node.service": 0o644, "lib/systemd/system/shoal-supernode.service": 0o644,
		"share/man/man1/shoal.1": 0o644, "share/man/man1/shoal-install-containerd.1": 0o644, "share/bash-completion/completions/shoal": 0o644,
		"share/zsh/site-functions/_shoal": 0o644, "share/fish/vendor_completions.d/shoal.fish": 0o644, "share/doc/shoal/LICENSE": 0o644,
		"share/doc/shoal/THIRD-PARTY-LICENSES": 0o644,
	} {
		if got[name] != mode {
			t.Errorf("%s: mode %#o, want %#o", name, got[name], mode)
		}
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(prefix, "bin/shoal"), "version").Output()
	if err != nil || !strings.HasPrefix(string(out), "shoal v1.2.3 ") {
		t.Errorf("shoal version prints %q, %v", out, err)
	}
}

// TestSBOM: the file is CycloneDX, by the standard's own schema, and has each module
// that is in the program.
func TestSBOM(t *testing.T) {
	src, programs := buildHere(t, work)
	for _, p := range programs[0].Programs {
		t.Run(p.Name, func(t *testing.T) { testSBOM(t, src, p) })
	}
}

func testSBOM(t *testing.T, src *source, p program) {
	file := filepath.Join(t.TempDir(), "sbom.json")
	noError(t, writeSBOM(file, src, p))
	text, err := os.ReadFile(file)
	noError(t, err)
	module, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/CycloneDX/cyclonedx-go").Output()
	noError(t, err)
	// The schema names two others by their addresses; all three are files of the module.
	var files []gojsonschema.JSONLoader
	for _, name := range []string{"spdx.schema.json", "jsf-0.82.schemax.json", "bom-1.6.schema.json"} {
		b, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(module)), "schema", name))
		noError(t, err)
		files = append(files, gojsonschema.NewBytesLoader(b))
	}
	loader := gojsonschema.NewSchemaLoader()
	noError(t, loader.AddSchemas(files[:2]...))
	schema, err := loader.Compile(files[2])
	noError(t, err)
	result, err := schema.Validate(gojsonschema.NewBytesLoader(text))
	noError(t, err)
	for _, e := range result.Errors() {
		t.Error(e)
	}
	var bom struct {
		Components []struct{ Name, Version string }
	}
	noError(t, json.Unmarshal(text, &bom))
	has := map[string]string{}
	for _, c := range bom.Components {
		has[c.Name] = c.Version
	}
	info, err := buildinfo.ReadFile(p.File)
	noError(t, err)
	for _, m := range info.Deps {
		if path, version := used(src, m); has[path] != version {
			t.Errorf("%s %s: the SBOM has %q", path, version, has[path])
		}
	}
	if got := has["github.com/shoalfs/shoal"]; p.Image && got != src.Version {
		t.Errorf("the module of this repository has the version %q, want %s", got, src.Version)
	}
	if len(bom.Components) != len(info.Deps)+1 || has["std"] == "" {
		t.Errorf("the SBOM has %d components, the program %d modules and the standard library", len(bom.Components), len(info.Deps))
	}
}

// TestNoRelease: what cannot be released is refused, and the text says what to do.
func TestNoRelease(t *testing.T) {
	repo := t.TempDir()
	run := func(args ...string) {
		t.Helper()
		args = append([]string{"-c", "user.name=lab", "-c", "user.email=lab@lab.test", "-c", "init.defaultBranch=main"}, args...)
		_, err := git(t.Context(), repo, args...)
		noError(t, err)
	}
	write := func(name, text string) {
		t.Helper()
		noError(t, os.MkdirAll(filepath.Dir(filepath.Join(repo, name)), 0o755))
		noError(t, os.WriteFile(filepath.Join(repo, name), []byte(text), 0o644))
	}
	check := func(version, want string) {
		t.Helper()
		src, err := readSource(t.Context(), version)
		noError(t, err)
		err = checkRelease(t.Context(), src)
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: %v", version, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v; want an error that says %q", version, err, want)
		}
	}
	t.Chdir(repo)
	run("init", "-q")
	write("changelog/unreleased/fix-a.md", "A is mended.\nDo nothing.\n")
	write("changelog/unreleased/security-b.md", "B is closed.\n")
	run("add", ".")
	run("commit", "-q", "-m", "all")
	check("v1.2.3-4-gabcdef0", "SNAPSHOT=1")
	check("v1.2.3", "the tag v1.2.3 is not on the commit")
	run("tag", "v1.2.3")
	check("v1.2.3", changelogFile)
	src, err := readSource(t.Context(), "v1.2.3")
	noError(t, err)
	noError(t, moveChangelog(repo, "v1.2.3", src.Time))
	check("v1.2.3", "the working tree differs")
	run("add", ".")
	run("commit", "-q", "-m", "changelog")
	run("tag", "-f", "v1.2.3")
	check("v1.2.3", "")
	notes, err := releaseNotes(src)
	noError(t, err)
	if want := "### Security\n\n- B is closed.\n\n### Fixed\n\n- A is mended.\n  Do nothing.\n"; notes != want {
		t.Errorf("the notes are %q, want %q", notes, want)
	}
	if err := moveChangelog(repo, "v1.2.4", src.Time); err == nil {
		t.Error("a changelog without fragments is no error")
	}
	write("changelog/unreleased/change-c.md", "C is other.\n")
	noError(t, moveChangelog(repo, "v1.2.4", src.Time))
	if again, err := releaseNotes(src); err != nil || again != notes {
		t.Errorf("the notes of v1.2.3 are %q after v1.2.4, %v", again, err)
	}
	write("README", "changed")
	check("v1.2.3", "the working tree differs")
}
