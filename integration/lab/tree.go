package lab

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Differences compares two directory trees entry by entry: names, types, modes,
// owners, modification times, sizes, hard link groups, device numbers, extended
// attributes and contents. It returns a line for each difference, the first 50.
//
// Directories that no layer has an entry for get the time of unpacking from
// containerd; timeless says which these are (nil: the root alone), and their
// modification times are not compared.
func Differences(a, b string, timeless func(name string) bool) ([]string, error) {
	if timeless == nil {
		timeless = func(name string) bool { return name == "." }
	}
	left, err := readTree(a, timeless)
	if err != nil {
		return nil, err
	}
	right, err := readTree(b, timeless)
	if err != nil {
		return nil, err
	}
	var diffs []string
	names := make([]string, 0, len(left))
	for name := range left {
		names = append(names, name)
	}
	for name := range right {
		if _, ok := left[name]; !ok {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		l, r := left[name], right[name]
		switch {
		case l == "":
			diffs = append(diffs, fmt.Sprintf("%s: only in %s: %s", name, b, r))
		case r == "":
			diffs = append(diffs, fmt.Sprintf("%s: only in %s: %s", name, a, l))
		case l != r:
			diffs = append(diffs, fmt.Sprintf("%s:\n  %s\n  %s", name, l, r))
		}
		if len(diffs) == 50 {
			break
		}
	}
	return diffs, nil
}

// readTree describes each entry below root in one line.
func readTree(root string, timeless func(string) bool) (map[string]string, error) {
	tree := map[string]string{}
	links := map[uint64]string{} // inode -> the name that sorts first
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		tree[name], err = describe(path, name, timeless(name), links)
		return err
	})
	return tree, err
}

func describe(path, name string, timeless bool, links map[uint64]string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "mode=%o uid=%d gid=%d", st.Mode, st.Uid, st.Gid)
	if !timeless {
		fmt.Fprintf(&b, " mtime=%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		// WalkDir goes in lexical order, so that the first name of a group is
		// the same in equal trees.
		if st.Nlink > 1 {
			if links[st.Ino] == "" {
				links[st.Ino] = name
			}
			fmt.Fprintf(&b, " nlink=%d link=%s", st.Nlink, links[st.Ino])
		}
		sum, err := fileSum(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, " size=%d sha256=%s", st.Size, sum)
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, " target=%q", target)
	case unix.S_IFCHR, unix.S_IFBLK:
		fmt.Fprintf(&b, " rdev=%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	attrs, err := xattrs(path)
	if err != nil {
		return "", err
	}
	b.WriteString(attrs)
	return b.String(), nil
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(path string) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("list xattrs of %s: %w", path, err)
	}
	names := bytes.Split(bytes.TrimSuffix(buf[:n], []byte{0}), []byte{0})
	sort.Slice(names, func(i, j int) bool { return bytes.Compare(names[i], names[j]) < 0 })
	var b strings.Builder
	value := make([]byte, 64<<10)
	for _, name := range names {
		if len(name) == 0 {
			continue
		}
		n, err := unix.Lgetxattr(path, string(name), value)
		if err != nil {
			return "", fmt.Errorf("xattr %s of %s: %w", name, path, err)
		}
		fmt.Fprintf(&b, " %s=%x", name, value[:n])
	}
	return b.String(), nil
}

// File is a regular file of a tree.
type File struct {
	Name   string
	Size   int64
	SHA256 string
}

// Files lists the regular files below root, names in lexical order; of a hard
// link group each name counts as a file.
func Files(root string) ([]File, error) {
	var files []File
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		sum, err := fileSum(path)
		files = append(files, File{Name: name, Size: info.Size(), SHA256: sum})
		return err
	})
	return files, err
}
