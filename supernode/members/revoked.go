package members

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"
)

// revoked are the identities that are never let in, in a file: one peer ID a line.
type revoked struct {
	path string

	// changing is held while the list is changed, file and all, so that of two changes at
	// a time none is lost.
	changing sync.Mutex

	mu  sync.Mutex
	ids map[peer.ID]struct{}
}

func openRevoked(path string) (*revoked, error) {
	r := &revoked{path: path, ids: map[peer.ID]struct{}{}}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list of revoked nodes: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		id, err := peer.Decode(line)
		if err != nil {
			// Never skipped: it may have been somebody's.
			return nil, fmt.Errorf("list of revoked nodes %s: line %d is no peer ID: put it right, or delete the line", path, n)
		}
		r.ids[id] = struct{}{}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list of revoked nodes %s: %w", path, err)
	}
	return r, nil
}

func (r *revoked) has(id peer.ID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.ids[id]
	return ok
}

func (r *revoked) list() []peer.ID {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]peer.ID, 0, len(r.ids))
	for id := range r.ids {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// set adds or removes an identity. It counts from when the file is written.
func (r *revoked) set(id peer.ID, in bool) error {
	r.changing.Lock()
	defer r.changing.Unlock()
	ids := r.list()
	i, found := slices.BinarySearch(ids, id)
	switch {
	case in == found:
		return nil
	case in:
		ids = slices.Insert(ids, i, id)
	default:
		ids = slices.Delete(ids, i, i+1)
	}
	if err := r.save(ids); err != nil {
		return fmt.Errorf("list of revoked nodes: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if in {
		r.ids[id] = struct{}{}
	} else {
		delete(r.ids, id)
	}
	return nil
}

// save replaces the file.
func (r *revoked) save(ids []peer.ID) error {
	var b strings.Builder
	for _, id := range ids {
		b.WriteString(id.String() + "\n")
	}
	f, err := os.CreateTemp(filepath.Dir(r.path), ".revoked-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // fails once it has its name
	_, err = f.WriteString(b.String())
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), r.path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(r.path))
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
