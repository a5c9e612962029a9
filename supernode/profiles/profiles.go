package profiles

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/profile"
	"github.com/shoalfs/shoal/internal/boltcheck"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/lru"
)

const (
	// maxReports is how many starts a profile is made of, each of another peer.
	maxReports = 4
	// reportEvery is how old the oldest of that many must be to make room for
	// another: a rollout of a thousand nodes tells nothing new a thousand times.
	reportEvery = 10 * time.Minute
	// maxProfiles bounds the diffs that there are profiles of; with three bytes a
	// chunk and a few thousand chunks each, tens of megabytes.
	maxProfiles = 4096
	// maxHandings bounds the record of which peer was handed what.
	maxHandings = 1 << 16
	// handedOutFor is for how long after a peer was handed an index it may report
	// what was read of the diff.
	handedOutFor = 24 * time.Hour
)

// Profiles is what is kept. All methods may be called from any goroutine.
type Profiles struct {
	db  *bbolt.DB
	log *slog.Logger
	now func() time.Time

	mu     sync.Mutex
	handed *lru.Map[handing, time.Time]
	last   *lru.Map[blockdev.Digest, struct{}] // the diffs, by their newest report
}

// handing is an index that a peer was handed.
type handing struct {
	peer string
	diff blockdev.Digest
}

// report is one start, as it is kept.
type report struct {
	Peer    string    `json:"peer"`
	At      time.Time `json:"at"`
	Profile []byte    `json:"profile"` // encoded
}

// profileRecord is the JSON of profileBucket, by DiffID.
type profileRecord struct {
	Reports []report `json:"reports"` // newest first, one of a peer
}

const (
	// File is where in the supernode's directory profiles are kept, and Lost is what a
	// damaged one costs.
	File = "profiles.db"
	Lost = "startup profiles are learned again"
)

var profileBucket = []byte("profiles-1")

// Open opens the file in dir, or begins it again if it is damaged. now is the time; nil:
// time.Now.
func Open(dir string, log *slog.Logger, now func() time.Time) (*Profiles, error) {
	if now == nil {
		now = time.Now
	}
	file := filepath.Join(dir, File)
	p := &Profiles{log: log, now: now, handed: lru.New[handing, time.Time](maxHandings), last: lru.Unbounded[blockdev.Digest, struct{}](nil)}
	err := p.open(file)
	if !errors.Is(err, blockdev.ErrCorrupt) {
		return p, err
	}
	log.Warn("the file of startup profiles is damaged; "+Lost, "file", file, "error", err)
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return p, p.open(file)
}

// open checks the file, opens it and reads which diffs it has.
func (p *Profiles) open(file string) (err error) {
	if err := boltcheck.File(file, nil); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if p.db, err = bbolt.Open(file, 0o600, &bbolt.Options{Timeout: time.Second}); err != nil {
		return fmt.Errorf("%s (does another supernode use the directory?): %w", file, err)
	}
	if err := p.load(); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", file, err), p.db.Close())
	}
	return nil
}

func (p *Profiles) load() error {
	return p.db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(profileBucket)
		if err != nil {
			return err
		}
		newest := map[blockdev.Digest]time.Time{}
		err = b.ForEach(func(k, v []byte) error {
			if rec, ok := readProfile(v); ok && len(k) == len(blockdev.Digest{}) {
				newest[blockdev.Digest(k)] = rec.Reports[0].At
			}
			return nil
		})
		for _, diff := range slices.SortedFunc(maps.Keys(newest), func(x, y blockdev.Digest) int { return newest[x].Compare(newest[y]) }) {
			p.last.Add(diff, struct{}{})
		}
		return err
	})
}

// Close closes the file.
func (p *Profiles) Close() error { return p.db.Close() }

// readProfile reads a record; one that is damaged is none.
func readProfile(v []byte) (profileRecord, bool) {
	var rec profileRecord
	err := json.Unmarshal(v, &rec)
	return rec, err == nil && len(rec.Reports) > 0
}

// HandOut notes that a peer is handed the indexes of an image, and puts in what
// is known of its start.
func (p *Profiles) HandOut(peer string, img *image.Image) {
	now := p.now()
	p.mu.Lock()
	for i := range img.Layers {
		p.handed.Add(handing{peer, img.Layers[i].DiffID}, now)
	}
	p.mu.Unlock()
	err := p.db.View(func(tx *bbolt.Tx) error {
		for i := range img.Layers {
			l := &img.Layers[i]
			if rec, ok := readProfile(tx.Bucket(profileBucket).Get(l.DiffID[:])); ok {
				l.Profile = rec.merged()
			}
		}
		return nil
	})
	if err != nil {
		p.log.Warn("cannot read startup profiles; nodes get this image without them", "error", err)
	}
}

func (r *profileRecord) merged() blockdev.Profile {
	var list []blockdev.Profile
	for _, rep := range r.Reports {
		// The chunk numbers were checked when it came.
		if q, err := profile.Decode(rep.Profile, ^uint32(0)); err == nil {
			list = append(list, q)
		}
	}
	return profile.Merge(list)
}

// mayReport says whether a peer was handed the index of a diff.
func (p *Profiles) mayReport(peer string, diff blockdev.Digest) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.handed.Peek(handing{peer, diff})
	return ok && p.now().Sub(at) < handedOutFor
}

// Report takes what a peer has learned of a start, if it tells something new. chunks says how
// many chunks the diff has, and is called only then. Errors are those of chunks, or wrap
// blockdev.ErrUnauthorized for a diff that the peer was not handed, or blockdev.ErrCorrupt
// for chunks that the diff does not have.
func (p *Profiles) Report(peer string, d blockdev.DiffProfile, chunks func() (int, error)) (kept bool, err error) {
	if !p.mayReport(peer, d.Diff) {
		return false, fmt.Errorf("this peer did not get its index: %w", blockdev.ErrUnauthorized)
	}
	if room, err := p.room(peer, d.Diff); err != nil || !room {
		return false, err
	}
	n, err := chunks()
	if err != nil {
		return false, err
	}
	if len(d.Profile) == 0 || len(d.Profile) > blockdev.MaxProfile {
		return false, fmt.Errorf("it has %d entries: %w", len(d.Profile), blockdev.ErrCorrupt)
	}
	for _, t := range d.Profile {
		if int64(t.Chunk) >= int64(n) {
			return false, fmt.Errorf("it names chunk %d, the diff has %d: %w", t.Chunk, n, blockdev.ErrCorrupt)
		}
	}
	if err := p.add(peer, d); err != nil {
		return false, fmt.Errorf("not kept: %w", err)
	}
	return true, nil
}

// room says whether a report of a peer's would be kept: a peer that has nothing new to
// say costs one look.
func (p *Profiles) room(peer string, diff blockdev.Digest) (room bool, err error) {
	n := report{Peer: peer, At: p.now()}
	err = p.db.View(func(tx *bbolt.Tx) error {
		rec, _ := readProfile(tx.Bucket(profileBucket).Get(diff[:]))
		room = rec.add(n)
		return nil
	})
	return room, err
}

// add takes a report whose chunks are ones of the diff.
func (p *Profiles) add(peer string, d blockdev.DiffProfile) error {
	now := p.now()
	n := report{Peer: peer, At: now, Profile: profile.Append(nil, d.Profile)}
	err := p.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(profileBucket)
		rec, _ := readProfile(b.Get(d.Diff[:]))
		if !rec.add(n) {
			return nil
		}
		v, err := json.Marshal(&rec)
		if err != nil {
			return err
		}
		for _, old := range p.surplus(d.Diff) {
			if err := b.Delete(old[:]); err != nil {
				return err
			}
		}
		return b.Put(d.Diff[:], v)
	})
	if err == nil {
		p.mu.Lock()
		p.last.Add(d.Diff, struct{}{})
		p.mu.Unlock()
	}
	return err
}

// add puts a report in, if there is room for it.
func (r *profileRecord) add(n report) bool {
	i := slices.IndexFunc(r.Reports, func(o report) bool { return o.Peer == n.Peer })
	if i < 0 && len(r.Reports) >= maxReports {
		i = len(r.Reports) - 1
		if age := n.At.Sub(r.Reports[i].At); age >= 0 && age < reportEvery {
			return false
		}
	}
	if i >= 0 {
		r.Reports = slices.Delete(r.Reports, i, i+1)
	}
	r.Reports = slices.Insert(r.Reports, 0, n)
	return true
}

// surplus forgets the diffs that were reported on longest ago, where another one
// needs the room, and returns them.
func (p *Profiles) surplus(diff blockdev.Digest) (old []blockdev.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.last.Contains(diff) && p.last.Len() >= maxProfiles {
		longest, _, _ := p.last.RemoveOldest()
		old = append(old, longest)
	}
	return old
}
