package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/durable"
)

const (
	quarantineDir = "quarantine"
	proofFile     = "proof"

	// proofVersion is that of both kinds of record.
	proofVersion = 1
)

// proofRecord is, as JSON, the file proof of a diff that is proven, a file in
// quarantine of one that is not to be trusted.
type proofRecord struct {
	Version int             `json:"version"`
	DiffID  blockdev.Digest `json:"diffID"`
	// Index is the SHA-256 of the encoded index that was looked at.
	Index blockdev.Digest `json:"index"`
	Time  time.Time       `json:"time"`
	// Own is the SHA-256 of the file index.own, whose tree is shown in place of that of
	// Index, which another version of the builder has made.
	Own blockdev.Digest `json:"own,omitzero"`
	// Cause says what differs; empty in the record of a proof.
	Cause string `json:"cause,omitempty"`
}

// maxProofRecord bounds what is read of a record, in bytes.
const maxProofRecord = 64 << 10

func decodeProof(b []byte, id blockdev.Digest) (rec proofRecord, err error) {
	if err := json.Unmarshal(b, &rec); err != nil {
		return rec, fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	if rec.Version != proofVersion || rec.DiffID != id || rec.Index == (blockdev.Digest{}) {
		return rec, fmt.Errorf("%w: record of version %d for diff %v", blockdev.ErrCorrupt, rec.Version, rec.DiffID)
	}
	return rec, nil
}

func readProof(path string, id blockdev.Digest) (proofRecord, error) {
	st, err := os.Stat(path)
	if err != nil {
		return proofRecord{}, err
	}
	if st.Size() > maxProofRecord {
		return proofRecord{}, fmt.Errorf("%s has %d bytes: %w", path, st.Size(), blockdev.ErrCorrupt)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return proofRecord{}, err
	}
	return decodeProof(b, id)
}

// writeProof replaces path durably.
func writeProof(path string, rec proofRecord) error {
	rec.Version, rec.Time = proofVersion, time.Now().UTC().Truncate(time.Second)
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return durable.Replace(path, b, 0o600)
}

// quarantine knows the indexes that failed their proof, also those whose diffs
// have been removed since, so that they are not taken in again.
type quarantine struct {
	dir string

	mu sync.Mutex
	m  map[blockdev.Digest]proofRecord
}

// openQuarantine reads the records in dir. One that does not parse counts for
// every index of its diff.
func openQuarantine(dir string, log *slog.Logger) (*quarantine, error) {
	q := &quarantine{dir: dir, m: make(map[blockdev.Digest]proofRecord)}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		id, ok := blockdev.ParseHex(e.Name())
		if !ok {
			log.Warn("not a quarantine record; ignored", "path", filepath.Join(dir, e.Name()))
			continue
		}
		rec, err := readProof(q.path(id), id)
		if err != nil {
			log.Error("a quarantine record is damaged; every index of this layer is refused", "diff", id, "path", q.path(id), "error", err)
			rec = proofRecord{DiffID: id, Cause: "the record of the cause is damaged"}
		}
		q.m[id] = rec
	}
	return q, nil
}

func (q *quarantine) path(id blockdev.Digest) string { return filepath.Join(q.dir, id.Hex()) }

// has says whether this index of a diff is under quarantine.
func (q *quarantine) has(id, index blockdev.Digest) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	rec, ok := q.m[id]
	return ok && (rec.Index == index || rec.Index == blockdev.Digest{})
}

// add puts an index under quarantine, whether or not that can be written down.
func (q *quarantine) add(id, index blockdev.Digest, cause error) error {
	rec := proofRecord{DiffID: id, Index: index, Cause: shorten(cause.Error())}
	q.mu.Lock()
	q.m[id] = rec
	q.mu.Unlock()
	return writeProof(q.path(id), rec)
}

// shorten bounds a text that another machine's bytes have a part in.
func shorten(s string) string {
	const most = 2 << 10
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

// putProven writes down that a diff's index is proven, or, if own is set, that the tree
// of another one is. Another index of the same diff that failed is history then.
func (q *quarantine) putProven(f folder, index, own blockdev.Digest) error {
	if err := writeProof(f.path(proofFile), proofRecord{DiffID: f.id, Index: index, Own: own}); err != nil {
		return err
	}
	q.mu.Lock()
	_, ok := q.m[f.id]
	delete(q.m, f.id)
	q.mu.Unlock()
	if !ok {
		return nil
	}
	if err := os.Remove(q.path(f.id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return durable.SyncDir(q.dir)
}

// why is the error for callers that want to use a quarantined diff.
func (q *quarantine) why(id blockdev.Digest) error {
	q.mu.Lock()
	rec := q.m[id]
	q.mu.Unlock()
	return fmt.Errorf("layer %v is %w since %s: all of its bytes are here, and they do not match its index (%s). "+
		"Either the supernode that made the index is wrong, or the memory of that machine or of this one. Running containers go on, new ones are refused. "+
		"To go on: stop the containers and remove the images that `shoal status` marks as quarantined, check the supernode (`shoal check`), and pull again; "+
		"while the supernode gives out the same index, containerd unpacks the images. To try the same index again, delete %s while the node is stopped",
		id, blockdev.ErrQuarantined, rec.Time.Format(time.RFC3339), rec.Cause, q.path(id))
}
