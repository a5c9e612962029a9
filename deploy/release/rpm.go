package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/google/rpmpack"
)

// rpmArch has rpm's words for architectures.
var rpmArch = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}

// writeRPM writes a package for rpm. Its payload is compressed with gzip, which all
// versions read.
func writeRPM(w io.Writer, src *source, p platform, tree []entry) error {
	arch, ok := rpmArch[p.Arch]
	if !ok {
		return fmt.Errorf("rpm's word for the architecture %s is not known", p.Arch)
	}
	r, err := rpmpack.NewRPM(rpmpack.RPMMetaData{
		Name: packageName, Version: packageVersion(src.Version), Release: "1", Arch: arch, OS: p.OS,
		Summary: summary, Description: description, URL: projectURL, Licence: license,
		Vendor: "shoal", Packager: maintainer,
		BuildHost: "localhost", // not this machine's name
		BuildTime: src.Time, Compressor: "gzip:6", Epoch: rpmpack.NoEpoch,
	})
	if err != nil {
		return err
	}
	for _, e := range packaged(tree) {
		f := rpmpack.RPMFile{Name: "/" + strings.TrimSuffix(e.Name, "/"), Mode: uint(e.Mode), Owner: "root", Group: "root", MTime: uint32(src.Time.Unix())}
		if strings.HasSuffix(e.Name, "/") {
			f.Mode |= 0o40000
		} else if f.Body, err = e.content(); err != nil {
			return err
		}
		if strings.Contains(f.Name, "/share/doc/shoal/") {
			f.Type = rpmpack.LicenceFile // stays where rpm is to leave out documentation
		}
		r.AddFile(f)
	}
	for name, add := range map[string]func(string){"postinstall.sh": r.AddPostin, "preremove.sh": r.AddPreun, "postremove.sh": r.AddPostun} {
		text, err := script(name)
		if err != nil {
			return err
		}
		add(text)
	}
	return r.Write(w)
}
