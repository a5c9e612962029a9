package access

import (
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	bberrors "go.etcd.io/bbolt/errors"

	"github.com/shoalfs/shoal/internal/image"
)

const (
	flushEvery = time.Second
	sweepEvery = time.Minute
	// stretchRounds makes a guess at a password, by an attacker that has the file,
	// cost some milliseconds.
	stretchRounds = 1 << 14
	maxStretched  = 1 << 12
)

// renewed are user names whose password is a token that nodes get again within
// hours (ECR, Google, Azure, identity tokens). An outage may last longer.
var renewed = map[string]bool{"AWS": true, "oauth2accesstoken": true, "00000000-0000-0000-0000-000000000000": true, "<token>": true}

// graceKey names a peer, a repository and a credential.
type graceKey [sha256.Size]byte

var (
	graceBucket = []byte("grace-2")
	metaBucket  = []byte("meta")
	saltKey     = []byte("salt")
	// oldBucket had no credentials in its keys.
	oldBucket = []byte("grace-1")
)

// load reads the accesses that were given, and drops what is too old to count.
func (a *Access) load() error {
	return a.db.Update(func(tx *bbolt.Tx) error {
		if err := tx.DeleteBucket(oldBucket); err != nil && !errors.Is(err, bberrors.ErrBucketNotFound) {
			return err
		}
		meta, err := tx.CreateBucketIfNotExists(metaBucket)
		if err != nil {
			return err
		}
		if a.salt = append([]byte(nil), meta.Get(saltKey)...); len(a.salt) == 0 {
			a.salt = make([]byte, sha256.Size)
			_, _ = rand.Read(a.salt) // never fails
			if err := meta.Put(saltKey, a.salt); err != nil {
				return err
			}
		}
		b, err := tx.CreateBucketIfNotExists(graceBucket)
		if err != nil {
			return err
		}
		var old [][]byte
		found := map[graceKey]time.Time{}
		err = b.ForEach(func(k, v []byte) error {
			if len(k) == len(graceKey{}) && len(v) == 8 {
				at := time.Unix(int64(binary.BigEndian.Uint64(v)), 0)
				if a.counts(at, a.cfg.Now()) {
					found[graceKey(k)] = at
					return nil
				}
			}
			old = append(old, append([]byte(nil), k...))
			return nil
		})
		for _, k := range slices.SortedFunc(maps.Keys(found), func(x, y graceKey) int { return found[x].Compare(found[y]) }) {
			a.seen.Add(k, found[k])
		}
		for _, k := range old {
			err = errors.Join(err, b.Delete(k))
		}
		return err
	})
}

func (a *Access) flush() {
	defer close(a.done)
	t := time.NewTicker(flushEvery)
	defer t.Stop()
	swept := a.cfg.Now()
	for {
		select {
		case <-a.stop:
			return
		case <-t.C:
			if now := a.cfg.Now(); now.Sub(swept) >= sweepEvery {
				swept = now
				a.sweep(now)
			}
			err := a.write()
			a.mu.Lock()
			a.failed = err
			a.mu.Unlock()
			if err != nil {
				a.cfg.Log.Error("cannot write the access records; new access does not count after a restart", "error", err)
			}
		}
	}
}

func (a *Access) write() error {
	a.mu.Lock()
	pending := a.pending
	a.pending = map[graceKey]int64{}
	a.mu.Unlock()
	if len(pending) == 0 {
		return nil
	}
	err := a.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(graceBucket)
		for k, at := range pending {
			if at == 0 {
				if err := b.Delete(k[:]); err != nil {
					return err
				}
				continue
			}
			if err := b.Put(k[:], binary.BigEndian.AppendUint64(nil, uint64(at))); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil { // to be written next time, unless there is something newer
		a.mu.Lock()
		for k, at := range pending {
			if _, newer := a.pending[k]; !newer {
				a.pending[k] = at
			}
		}
		a.mu.Unlock()
	}
	return err
}

// lasting is what stays the same of a credential, hashed slowly: all of it, or the
// user name if the rest is a token that is soon another one. "" for none.
func (a *Access) lasting(hash string, c image.Credential) string {
	if hash == "" {
		return ""
	}
	if renewed[c.Username] {
		return "user " + c.Username
	}
	a.mu.Lock()
	id, ok := a.stretched.Get(hash)
	a.mu.Unlock()
	if ok {
		return id
	}
	b, err := pbkdf2.Key(sha256.New, hash, a.salt, stretchRounds, sha256.Size)
	if err != nil {
		// Only where FIPS 140 mode refuses the parameters. It counts for nobody then.
		a.cfg.Log.Error("cannot hash a credential; it does not count while its registry is down", "error", err)
		b = []byte(rand.Text())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stretched.Add(hash, string(b))
	return string(b)
}

func (a *Access) key(peer, repo, credential string) graceKey {
	h := sha256.New()
	fmt.Fprintf(h, "%s%d:%s%d:%s%s", a.salt, len(peer), peer, len(repo), repo, credential)
	return graceKey(h.Sum(nil))
}

// publicKey is for everybody.
func publicKey(repo string) graceKey { return sha256.Sum256([]byte("public " + repo)) }

// counts says whether an earlier access still counts while the registry is down.
func (a *Access) counts(at, now time.Time) bool {
	age := now.Sub(at)
	return age >= -time.Minute && age < a.cfg.Grace
}

// before says whether there was an access that still counts.
func (a *Access) before(k graceKey, now time.Time) bool {
	at, _ := a.seen.Peek(k)
	return a.counts(at, now)
}

func (a *Access) note(k graceKey, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.noteLocked(k, now)
}

func (a *Access) noteLocked(k graceKey, now time.Time) {
	if old, ok := a.seen.Peek(k); ok && now.Sub(old) < a.cfg.TTL && now.After(old) {
		return // fresh enough; spares the disk
	}
	a.seen.Add(k, now)
	a.pending[k] = now.Unix()
}

// sweep forgets what does not count any more.
func (a *Access) sweep(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, k := range a.seen.Keys() {
		if !a.before(k, now) {
			a.seen.Remove(k)
		}
	}
}

// revoke takes back what a peer would have kept: the registry has said no.
func (a *Access) revoke(k graceKey) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seen.Remove(k)
}
