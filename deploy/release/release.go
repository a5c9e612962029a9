package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
)

// writeRelease fills a directory, which is emptied before, with all that a release
// has, and with the checksums of it.
func writeRelease(ctx context.Context, dir string, src *source, programs []built) error {
	here := slices.IndexFunc(programs, func(b built) bool { return b.OS == runtime.GOOS && b.Arch == runtime.GOARCH })
	if here < 0 {
		return fmt.Errorf("the platforms do not have %s/%s: the program for this machine writes the manual pages", runtime.GOOS, runtime.GOARCH)
	}
	d, err := writeDocs(ctx, src, programs[here].Programs[0].File)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	for _, b := range programs {
		if err := writePlatform(dir, src, b, d); err != nil {
			return fmt.Errorf("%s: %w", b, err)
		}
	}
	if err := writeImage(filepath.Join(dir, fmt.Sprintf("shoal_%s_image.tar", fileVersion(src.Version))), src, programs); err != nil {
		return err
	}
	if err := writeChart(ctx, dir, src); err != nil {
		return err
	}
	return writeChecksums(dir)
}

// writeChart has Helm's own library write the chart's package. That is a command of
// the chart's module: the library is ten times as big as all that is here.
func writeChart(ctx context.Context, dir string, src *source) error {
	_, err := goOutput(ctx, platform{OS: runtime.GOOS, Arch: runtime.GOARCH}, src.in("deploy/helm"), "run", ".",
		"--to="+dir, "--version="+fileVersion(src.Version), "--app-version="+src.Version, fmt.Sprintf("--time=%d", src.Time.Unix()))
	return err
}

// writePlatform writes archive, packages and SBOMs.
func writePlatform(dir string, src *source, b built, d *docs) error {
	name := func(program, ending string) string {
		return filepath.Join(dir, fmt.Sprintf("%s_%s_%s_%s.%s", program, fileVersion(src.Version), b.OS, b.Arch, ending))
	}
	files, err := tree(src, b, d, archiveLayout)
	if err != nil {
		return err
	}
	// Without directories: those of the machine keep their modes.
	if err := writeFile(name("shoal", "tar.gz"), func(w io.Writer) error { return writeTarGz(w, src.Time, files) }); err != nil {
		return err
	}
	for _, f := range []struct {
		ending string
		layout treeLayout
		write  func(io.Writer, *source, platform, []entry) error
	}{{"deb", debLayout, writeDeb}, {"rpm", rpmLayout, writeRPM}} {
		if files, err = tree(src, b, d, f.layout); err != nil {
			return err
		}
		if err := writeFile(name("shoal", f.ending), func(w io.Writer) error { return f.write(w, src, b.platform, files) }); err != nil {
			return err
		}
	}
	for _, p := range b.Programs {
		if err := writeSBOM(name(p.Name, "cdx.json"), src, p); err != nil {
			return err
		}
	}
	return nil
}

// writeChecksums writes a file that `sha256sum --check` reads.
func writeChecksums(dir string) error {
	const name = "checksums.txt"
	files, err := os.ReadDir(dir) // sorted
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, name), func(w io.Writer) error {
		for _, f := range files {
			sum, err := fileSum(filepath.Join(dir, f.Name()))
			if err != nil {
				return err
			}
			fmt.Fprintf(w, "%s  %s\n", sum, f.Name())
		}
		return nil
	})
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
