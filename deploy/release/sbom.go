package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/google/uuid"
)

// writeSBOM writes what a program is made of, in CycloneDX: the modules that Go's
// linker has recorded in it, and the standard library. How these depend on each
// other is not recorded, so the file does not say it.
func writeSBOM(name string, src *source, p program) error {
	bom, err := newSBOM(src, p)
	if err != nil {
		return fmt.Errorf("SBOM of %s: %w", p.File, err)
	}
	return writeFile(name, func(w io.Writer) error {
		return cdx.NewBOMEncoder(w, cdx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cdx.SpecVersion1_6)
	})
}

func newSBOM(src *source, p program) (*cdx.BOM, error) {
	info, err := buildinfo.ReadFile(p.File)
	if err != nil {
		return nil, err
	}
	sum, err := fileSum(p.File)
	if err != nil {
		return nil, err
	}
	var settings []cdx.Property
	for _, s := range info.Settings {
		settings = append(settings, cdx.Property{Name: "go:build:" + s.Key, Value: s.Value})
	}
	bom := cdx.NewBOM()
	// The same program has the same number.
	bom.SerialNumber = uuid.NewSHA1(uuid.NameSpaceURL, []byte(projectURL+"#sha256:"+sum)).URN()
	purl := "pkg:golang/" + info.Main.Path + "@" + src.Version
	bom.Metadata = &cdx.Metadata{
		Timestamp: src.Time.Format(time.RFC3339),
		Component: &cdx.Component{
			BOMRef: purl, Type: cdx.ComponentTypeApplication, Name: p.Name, Version: src.Version, PackageURL: purl,
			Description: description,
			Hashes:      &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: sum}},
			Licenses:    &cdx.Licenses{{License: &cdx.License{ID: license}}},
			Properties:  &settings,
			ExternalReferences: &[]cdx.ExternalReference{
				{Type: cdx.ERTypeVCS, URL: projectURL + "/tree/" + src.Revision},
			},
		},
	}
	components := []cdx.Component{library("std", strings.TrimPrefix(info.GoVersion, "go"))}
	for _, m := range info.Deps {
		components = append(components, library(used(src, m)))
	}
	bom.Components = &components
	return bom, nil
}

// used is the module that was built where m is required, and its version. One of
// this repository has the version of all of it.
func used(src *source, m *debug.Module) (path, version string) {
	switch {
	case m.Replace == nil:
		return m.Path, m.Version
	case m.Replace.Version == "" || m.Replace.Version == "(devel)": // a directory
		return m.Path, src.Version
	}
	return m.Replace.Path, m.Replace.Version
}

func library(path, version string) cdx.Component {
	// "+incompatible" has a character that a URL would read as a space.
	purl := "pkg:golang/" + path + "@" + strings.ReplaceAll(version, "+", "%2B")
	return cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: path, Version: version, PackageURL: purl}
}

// fileSum is a file's SHA-256 in hex.
func fileSum(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
