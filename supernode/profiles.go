package supernode

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/profile"
	"github.com/shoalfs/shoal/internal/boltcheck"
	"github.com/shoalfs/shoal/supernode/internal/bounded"
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
	// maxHandings bounds what is kept of who was handed what.
	maxHandings = 1 << 16
	// handedOutFor is for how long after a peer was handed an index it may report
	// what was read of the diff.
	handedOutFor = 24 * time.Hour
)

// profiles keeps what nodes have learned of starts, by diff. It outlives the
// diff's chunks: when they come back, they have the same numbers.
//
// A report is worth as much as the node that sends it. It is kept only if it
// speaks of a diff whose index that node was handed, and names chunks that the
// diff has; what it says beyond that only orders what nodes fetch.
type profiles struct {
	db  *bbolt.DB
	log *slog.Logger
	now func() time.Time

	mu     sync.Mutex
	handed map[handing]time.Time
	last   map[blockdev.Digest]time.Time // of each diff's newest report
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

// profilesFile is where startup profiles are kept.
const profilesFile = "profiles.db"

var profileBucket = []byte("profiles-1")

func openProfiles(dir string, log *slog.Logger, now func() time.Time) (*profiles, error) {
	file := filepath.Join(dir, profilesFile)
	p := &profiles{log: log, now: now, handed: map[handing]time.Time{}, last: map[blockdev.Digest]time.Time{}}
	err := p.open(file)
	if !errors.Is(err, blockdev.ErrCorrupt) {
		return p, err
	}
	log.Warn("startup profiles are damaged and are learned anew", "file", file, "error", err)
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return p, p.open(file)
}

// open checks the file, opens it and reads which diffs it has.
func (p *profiles) open(file string) (err error) {
	if err := boltcheck.File(file, nil); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if p.db, err = bbolt.Open(file, 0o600, &bbolt.Options{Timeout: time.Second}); err != nil {
		return fmt.Errorf("%s (is another supernode using the directory?): %w", file, err)
	}
	if err := p.load(); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", file, err), p.db.Close())
	}
	return nil
}

func (p *profiles) load() error {
	return p.db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(profileBucket)
		if err != nil {
			return err
		}
		return b.ForEach(func(k, v []byte) error {
			if rec, ok := readProfile(v); ok && len(k) == len(blockdev.Digest{}) {
				p.last[blockdev.Digest(k)] = rec.Reports[0].At
			}
			return nil
		})
	})
}

func (p *profiles) Close() error { return p.db.Close() }

// readProfile reads a record; one that is damaged is none.
func readProfile(v []byte) (profileRecord, bool) {
	var rec profileRecord
	err := json.Unmarshal(v, &rec)
	return rec, err == nil && len(rec.Reports) > 0
}

// handOut notes that a peer is handed the indexes of an image, and puts in what
// is known of its start.
func (p *profiles) handOut(peer string, img *blockdev.Image) {
	now := p.now()
	p.mu.Lock()
	for i := range img.Layers {
		bounded.MakeRoom(p.handed, maxHandings)
		p.handed[handing{peer, img.Layers[i].DiffID}] = now
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
		p.log.Warn("startup profiles not read", "error", err)
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
func (p *profiles) mayReport(peer string, diff blockdev.Digest) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.handed[handing{peer, diff}]
	return ok && p.now().Sub(at) < handedOutFor
}

// room says whether a report of a peer's would be kept: whoever has nothing new to
// say costs one look.
func (p *profiles) room(peer string, diff blockdev.Digest) (room bool, err error) {
	n := report{Peer: peer, At: p.now()}
	err = p.db.View(func(tx *bbolt.Tx) error {
		rec, _ := readProfile(tx.Bucket(profileBucket).Get(diff[:]))
		room = rec.add(n)
		return nil
	})
	return room, err
}

// add takes a report whose chunks are ones of the diff.
func (p *profiles) add(peer string, d blockdev.DiffProfile) error {
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
		p.last[d.Diff] = now
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
func (p *profiles) surplus(diff blockdev.Digest) (old []blockdev.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.last[diff]; ok {
		return nil
	}
	return bounded.MakeRoom(p.last, maxProfiles)
}

// ReportProfileFrom implements exchange.Profiles. Errors wrap
// blockdev.ErrUnauthorized for a diff that the peer was not handed,
// blockdev.ErrNotFound for one that is not stored any more, blockdev.ErrCorrupt
// for chunks that it does not have. A report that tells nothing new is not looked at.
func (s *Supernode) ReportProfileFrom(ctx context.Context, peer string, p blockdev.DiffProfile) error {
	if !s.profiles.mayReport(peer, p.Diff) {
		return fmt.Errorf("startup profile of diff %s: this peer was not handed its index: %w", p.Diff, blockdev.ErrUnauthorized)
	}
	if room, err := s.profiles.room(peer, p.Diff); err != nil || !room {
		return err
	}
	// Whoever has just started the image has asked for its index, so that is here as a
	// rule.
	e, err := s.indexes.get(ctx, p.Diff)
	if err != nil {
		return fmt.Errorf("startup profile of diff %s: %w", p.Diff, err)
	}
	info, err := index.Peek(e.data)
	if err != nil {
		return fmt.Errorf("startup profile of diff %s: %w", p.Diff, err)
	}
	if len(p.Profile) == 0 || len(p.Profile) > blockdev.MaxProfile {
		return fmt.Errorf("startup profile of diff %s with %d chunks: %w", p.Diff, len(p.Profile), blockdev.ErrCorrupt)
	}
	for _, t := range p.Profile {
		if int64(t.Chunk) >= int64(info.Chunks) {
			return fmt.Errorf("startup profile of diff %s names chunk %d, the diff has %d: %w", p.Diff, t.Chunk, info.Chunks, blockdev.ErrCorrupt)
		}
	}
	if err := s.profiles.add(peer, p); err != nil {
		return fmt.Errorf("startup profile of diff %s not kept: %w", p.Diff, err)
	}
	s.metrics.profiles.Inc()
	return nil
}

// ReportProfiles implements blockdev.ProfileSink for the process that the
// supernode lives in.
func (s *Supernode) ReportProfiles(ctx context.Context, list []blockdev.DiffProfile) error {
	var errs []error
	for _, p := range list {
		errs = append(errs, s.ReportProfileFrom(ctx, "", p))
	}
	return errors.Join(errs...)
}
