package main

import (
	"bytes"
	"crypto/md5" //nolint:gosec // dpkg's format wants it; it is for damage, not for attacks
	"fmt"
	"io"
	"strings"
	"time"
)

// writeDeb writes a package as deb(5) describes it: an ar archive of a version, the
// control files, and the files.
func writeDeb(w io.Writer, src *source, p platform, tree []entry) error {
	files := packaged(tree)
	control, err := debControl(src, p, files)
	if err != nil {
		return err
	}
	members := []entry{{Name: "debian-binary", Data: []byte("2.0\n")}, {Name: "control.tar.gz"}, {Name: "data.tar.gz"}}
	for i, entries := range [][]entry{control, withDirectories(files)} {
		var packed bytes.Buffer
		for j := range entries {
			entries[j].Name = "./" + entries[j].Name // as dpkg lists them
		}
		if err := writeTarGz(&packed, src.Time, entries); err != nil {
			return err
		}
		members[i+1].Data = packed.Bytes()
	}
	return writeAr(w, src.Time, members)
}

// debControl makes what dpkg reads: the description, the sums and the scripts.
func debControl(src *source, p platform, files []entry) ([]entry, error) {
	var sums strings.Builder
	size := 0
	for _, f := range files {
		if strings.HasSuffix(f.Name, "/") {
			continue
		}
		data, err := f.content()
		if err != nil {
			return nil, err
		}
		size += len(data)
		fmt.Fprintf(&sums, "%x  %s\n", md5.Sum(data), f.Name) //nolint:gosec // as above
	}
	control := fmt.Sprintf(`Package: %s
Version: %s
Architecture: %s
Maintainer: %s
Installed-Size: %d
Section: admin
Priority: optional
Homepage: %s
Description: %s
 %s
`, packageName, packageVersion(src.Version), p.Arch, maintainer, (size+1023)/1024, projectURL, summary, description)
	all := []entry{{Name: "control", Mode: 0o644, Data: []byte(control)}, {Name: "md5sums", Mode: 0o644, Data: []byte(sums.String())}}
	for _, s := range []struct{ name, from string }{{"postinst", "postinstall.sh"}, {"postrm", "postremove.sh"}, {"prerm", "preremove.sh"}} {
		text, err := script(s.from)
		if err != nil {
			return nil, err
		}
		all = append(all, entry{Name: s.name, Mode: 0o755, Data: []byte(text)})
	}
	return all, nil
}

// writeAr writes an archive as ar(5) describes it.
func writeAr(w io.Writer, at time.Time, members []entry) error {
	if _, err := io.WriteString(w, "!<arch>\n"); err != nil {
		return err
	}
	for _, m := range members {
		if _, err := fmt.Fprintf(w, "%-16s%-12d%-6d%-6d%-8o%-10d`\n", m.Name, at.Unix(), 0, 0, 0o100644, len(m.Data)); err != nil {
			return err
		}
		if len(m.Data)%2 == 1 {
			m.Data = append(m.Data, '\n')
		}
		if _, err := w.Write(m.Data); err != nil {
			return err
		}
	}
	return nil
}
