package main

import (
	"archive/tar"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// entry is a file or, with a name that ends with a slash, a directory.
type entry struct {
	Name string // without a slash in front
	Mode int64
	From string // the file with its content; if empty, then Data has it
	Data []byte
}

// writeTar writes entries in their order, owned by root, all with one time.
func writeTar(w io.Writer, at time.Time, entries []entry) error {
	tw := tar.NewWriter(w)
	for _, e := range entries {
		if err := writeEntry(tw, at, e); err != nil {
			return fmt.Errorf("%s: %w", e.Name, err)
		}
	}
	return tw.Close()
}

func writeEntry(tw *tar.Writer, at time.Time, e entry) error {
	h := &tar.Header{Name: e.Name, Mode: e.Mode, ModTime: at, Typeflag: tar.TypeReg, Size: int64(len(e.Data)), Format: tar.FormatPAX}
	if strings.HasSuffix(e.Name, "/") {
		h.Typeflag = tar.TypeDir
		return tw.WriteHeader(h)
	}
	if e.From == "" {
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		_, err := tw.Write(e.Data)
		return err
	}
	f, err := os.Open(e.From)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	h.Size = info.Size()
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(tw, f)
	return err
}

// writeTarGz is writeTar, compressed.
func writeTarGz(w io.Writer, at time.Time, entries []entry) error {
	gz, err := gzip.NewWriterLevel(w, gzip.DefaultCompression)
	if err != nil {
		return err
	}
	if err := writeTar(gz, at, entries); err != nil {
		return err
	}
	return gz.Close()
}

// writeFile has write fill a file, which is there under its name when it is whole.
func writeFile(name string, write func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // if it is still there
	err = write(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}
