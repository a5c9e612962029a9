package access

import (
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
	bberrors "go.etcd.io/bbolt/errors"

	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
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

var (
	peersBucket  = []byte("peers")
	publicBucket = []byte("public")
	metaBucket   = []byte("meta")
	saltKey      = []byte("salt")
	// oldBuckets have keys that do not say to which peer they belong.
	oldBuckets = [][]byte{[]byte("grace-1"), []byte("grace-2")}
)

// load reads the accesses that were given, and drops what is too old to count.
func (a *Access) load() error {
	return a.db.Update(func(tx *bbolt.Tx) error {
		for _, name := range oldBuckets {
			if err := tx.DeleteBucket(name); err != nil && !errors.Is(err, bberrors.ErrBucketNotFound) {
				return err
			}
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
		return errors.Join(loadBucket(tx, publicBucket, a.public, a.cfg.Now()), loadBucket(tx, peersBucket, a.peers, a.cfg.Now()))
	})
}

func loadBucket(tx *bbolt.Tx, name []byte, into *seen, now time.Time) error {
	b, err := tx.CreateBucketIfNotExists(name)
	if err != nil {
		return err
	}
	var bad [][]byte
	err = b.ForEach(func(k, v []byte) error {
		if !into.load(k, v) {
			bad = append(bad, append([]byte(nil), k...))
		}
		return nil
	})
	for _, k := range bad {
		err = errors.Join(err, b.Delete(k))
	}
	into.sweep(now)
	return err
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
	peers, public := a.peers.changes(), a.public.changes()
	a.mu.Unlock()
	if len(peers)+len(public) == 0 {
		return nil
	}
	err := a.db.Update(func(tx *bbolt.Tx) error {
		return errors.Join(put(tx.Bucket(peersBucket), peers), put(tx.Bucket(publicBucket), public))
	})
	if err != nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.peers.unwritten(peers)
		a.public.unwritten(public)
	}
	return err
}

func put(b *bbolt.Bucket, changes map[groupID][]byte) error {
	for id, v := range changes {
		var err error
		if len(v) == 0 {
			err = b.Delete(id[:])
		} else {
			err = b.Put(id[:], v)
		}
		if err != nil {
			return err
		}
	}
	return nil
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

// key names what a peer may read with a credential.
func (a *Access) key(peer string, ref registry.Reference, credential string) accessKey {
	return makeKey(a.hash("peer", peer), a.hash("host", ref.Host), a.hash("access", peer, ref.Name(), credential))
}

func (a *Access) hash(words ...string) [sha256.Size]byte {
	h := sha256.New()
	h.Write(a.salt)
	for _, w := range words {
		fmt.Fprintf(h, "%d:%s", len(w), w)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// publicKey is for everybody.
func publicKey(ref registry.Reference) accessKey {
	host := sha256.Sum256([]byte("public " + ref.Host))
	return makeKey(host, host, sha256.Sum256([]byte("public "+ref.Name())))
}

func makeKey(group, host, access [sha256.Size]byte) (k accessKey) {
	k.group = groupID(group[:])
	copy(k.id[copy(k.id[:], host[:hostSize]):], access[:])
	return k
}

func (a *Access) note(k accessKey, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.peers.note(k, now)
}

func (a *Access) sweep(now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.peers.sweep(now)
	a.public.sweep(now)
}

// revoke takes back what a peer would have kept: the registry has said no.
func (a *Access) revoke(k accessKey) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.peers.forget(k)
}
