package roster

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/internal/durable"
)

// revoked are the identities that are never let in, in a file: one peer ID a line. A
// second file says when each was revoked or allowed again: of what siblings have done
// the latest counts.
type revoked struct {
	path string
	now  func() time.Time

	// changing is held while the list is changed, file and all, so that of two changes at
	// a time none is lost.
	changing sync.Mutex

	mu      sync.Mutex
	ids     map[peer.ID]struct{}
	changes revocations
	version uint64 // of changes
}

// revocation is the last that was done about an identity.
type revocation struct {
	At int64 `json:"at"` // Unix nanoseconds
	In bool  `json:"revoked"`
}

// revocations are the nodes that were revoked or allowed again; in JSON, by their peer IDs as text.
type revocations map[peer.ID]revocation

// MarshalJSON implements json.Marshaler.
func (r revocations) MarshalJSON() ([]byte, error) {
	out := make(map[string]revocation, len(r))
	for id, c := range r {
		out[id.String()] = c
	}
	return json.Marshal(out)
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *revocations) UnmarshalJSON(b []byte) error {
	var in map[string]revocation
	if err := json.Unmarshal(b, &in); err != nil {
		return err
	}
	*r = make(revocations, len(in))
	for text, c := range in {
		id, err := peer.Decode(text)
		if err != nil {
			return fmt.Errorf("%.100q is not a peer ID", text)
		}
		(*r)[id] = c
	}
	return nil
}

// after says whether r counts before o.
func (r revocation) after(o revocation) bool { return r.At > o.At || r.At == o.At && r.In && !o.In }

func openRevoked(path string) (*revoked, error) {
	r := &revoked{path: path, now: time.Now, ids: map[peer.ID]struct{}{}, changes: revocations{}}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, r.loadChanges()
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
			return nil, fmt.Errorf("list of revoked nodes %s: line %d is not a peer ID: correct the line, or delete it", path, n)
		}
		r.ids[id] = struct{}{}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list of revoked nodes %s: %w", path, err)
	}
	return r, r.loadChanges()
}

func (r *revoked) changesPath() string { return r.path + "-changes.json" }

// loadChanges reads when what was done. The list itself is what counts here: where the two
// differ, it was changed by hand, by an older version or before a crash, and that is now.
func (r *revoked) loadChanges() error {
	b, err := os.ReadFile(r.changesPath())
	if err == nil {
		err = json.Unmarshal(b, &r.changes)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list of revoked nodes %s: %w: delete the file, and see that `shoal members` lists the same revoked nodes on each supernode", r.changesPath(), err)
	}
	at := r.now().UnixNano()
	for id := range r.ids {
		if !r.changes[id].In {
			r.changes[id] = revocation{at, true}
		}
	}
	for id, c := range r.changes {
		if _, in := r.ids[id]; c.In && !in {
			r.changes[id] = revocation{at, false}
		}
	}
	return nil
}

// all returns what was done about which nodes, and its version.
func (r *revoked) all() (revocations, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.changes), r.version
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
	r.mu.Lock()
	before := r.changes[id]
	r.mu.Unlock()
	if before.In == in {
		return nil
	}
	// Later than what is known, whatever the clocks of siblings say.
	return r.change(revocations{id: {max(r.now().UnixNano(), before.At+1), in}})
}

// merge takes what a sibling knows, as far as it is later, and returns the nodes that are revoked
// now and was not.
func (r *revoked) merge(theirs revocations) (added []peer.ID, err error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	mine, _ := r.all()
	later := revocations{}
	for id, c := range theirs {
		if before, known := mine[id]; !known || c.after(before) {
			later[id] = c
			if c.In && !before.In {
				added = append(added, id)
			}
		}
	}
	if len(later) == 0 {
		return nil, nil
	}
	return added, r.change(later)
}

// change writes changes down, and makes them count; changing is held.
func (r *revoked) change(changes revocations) error {
	all, _ := r.all()
	maps.Copy(all, changes)
	var ids []peer.ID
	for id, c := range all {
		if c.In {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	var list strings.Builder
	for _, id := range ids {
		list.WriteString(id.String() + "\n")
	}
	b, err := json.Marshal(all)
	if err == nil {
		err = durable.Replace(r.path, []byte(list.String()), 0o600)
	}
	if err == nil {
		err = durable.Replace(r.changesPath(), b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("list of revoked nodes: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changes = all
	r.version++
	clear(r.ids)
	for _, id := range ids {
		r.ids[id] = struct{}{}
	}
	return nil
}
