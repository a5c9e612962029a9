package registry

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/internal/lru"

	"github.com/shoalfs/shoal/blockdev"
)

// cache keeps small documents on disk: manifests and configs, which are hashed
// again whenever they are read, and what tags named last. Each is a file named
// by the SHA-256 of its host and of its key, so that names from outside never become
// paths. It is bounded by bytes, as they are on disk, and by maxFiles. Of the host that
// has most, the least recently used go first: a registry that answers with much pushes
// out its own. Nothing is lost with it but time, so it is not synced.
type cache struct {
	dir   string
	limit int64 // bytes
	most  int   // files

	mu     sync.Mutex
	shares map[string]*share // by shareOf(file name); none is empty
	bytes  int64
	count  int // files
}

// share is what one host has of the cache.
type share struct {
	files *lru.Map[string, int64] // file names, and the bytes that they take of the disk
	bytes int64
}

const (
	// block is what the smallest file takes of a disk: what a tag names is 71 bytes.
	block = 4096
	// maxFiles bounds the inodes.
	maxFiles = 1 << 16
)

// onDisk is what a file of n bytes takes.
func onDisk(n int64) int64 { return (n + block - 1) / block * block }

func openCache(dir string, limit int64) (*cache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	c := &cache{dir: dir, limit: limit, most: maxFiles, shares: map[string]*share{}}
	var infos []fs.FileInfo
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || !fi.Mode().IsRegular() {
			continue
		}
		if len(e.Name()) != nameLen || e.Name()[shareLen] != '-' {
			// Left over from a write that was cut short, or of an earlier version.
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
			continue
		}
		infos = append(infos, fi)
	}
	sort.Slice(infos, func(i, j int) bool { return infos[i].ModTime().Before(infos[j].ModTime()) })
	for _, fi := range infos {
		c.add(fi.Name(), onDisk(fi.Size()))
	}
	return c, nil
}

const (
	shareLen = 16                           // digits of the host's hash
	nameLen  = shareLen + 1 + 2*sha256.Size // and those of the key's
)

// fileName names what is known of repository at its host. The port does not count:
// one machine has many.
func fileName(kind, repository, key string) string {
	host, _, _ := strings.Cut(repository, "/")
	whose := sha256.Sum256([]byte((&url.URL{Host: host}).Hostname()))
	h := sha256.Sum256([]byte(kind + "\x00" + repository + key))
	return hex.EncodeToString(whose[:shareLen/2]) + "-" + hex.EncodeToString(h[:])
}

func shareOf(name string) string { return name[:shareLen] }

// add records a file as the most recently used, and removes what is too much.
func (c *cache) add(name string, size int64) {
	c.mu.Lock()
	s := c.shares[shareOf(name)]
	if s == nil {
		s = new(share)
		s.files = lru.Unbounded(func(_ string, size int64) { // what follows bounds it
			s.bytes -= size
			c.bytes -= size
			c.count--
		})
		c.shares[shareOf(name)] = s
	}
	s.files.Remove(name)
	s.files.Add(name, size)
	s.bytes += size
	c.bytes += size
	c.count++
	var gone []string
	for c.bytes > c.limit || c.count > c.most {
		big := c.biggest(name)
		if big == nil {
			break
		}
		oldest, _, _ := big.files.RemoveOldest()
		if big.files.Len() == 0 {
			delete(c.shares, shareOf(oldest))
		}
		gone = append(gone, oldest)
	}
	c.mu.Unlock()
	for _, n := range gone {
		_ = os.Remove(filepath.Join(c.dir, n)) // at worst it counts again after a restart
	}
}

// biggest is the share of most bytes, apart from one that has only the file added; nil
// if there is no other.
func (c *cache) biggest(added string) (big *share) {
	for of, s := range c.shares {
		if (s.files.Len() > 1 || of != shareOf(added)) && (big == nil || s.bytes > big.bytes) {
			big = s
		}
	}
	return big
}

// get returns the file's content and when it was written.
func (c *cache) get(name string, limit int64) ([]byte, time.Time, bool) {
	if c == nil {
		return nil, time.Time{}, false
	}
	c.mu.Lock()
	known := false
	if s := c.shares[shareOf(name)]; s != nil {
		_, known = s.files.Get(name)
	}
	c.mu.Unlock()
	if !known {
		return nil, time.Time{}, false
	}
	path := filepath.Join(c.dir, name)
	fi, err := os.Stat(path)
	if err != nil || fi.Size() > limit {
		return nil, time.Time{}, false
	}
	b, err := os.ReadFile(path)
	return b, fi.ModTime(), err == nil
}

func (c *cache) put(name string, data []byte) error {
	if c == nil || onDisk(int64(len(data))) > c.limit {
		return nil
	}
	f, err := os.CreateTemp(c.dir, "new-")
	if err != nil {
		return err
	}
	_, werr := f.Write(data)
	if err := errors.Join(werr, f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), filepath.Join(c.dir, name)); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	c.add(name, onDisk(int64(len(data))))
	return nil
}

// doc returns a document of a repository, hashed.
func (c *cache) doc(name string, d blockdev.Digest, limit int64) ([]byte, bool) {
	b, _, ok := c.get(fileName("doc", name, "@"+d.String()), limit)
	return b, ok && blockdev.Sum(b) == d
}

func (c *cache) putDoc(name string, d blockdev.Digest, b []byte) error {
	return c.put(fileName("doc", name, "@"+d.String()), b)
}

// tag returns what a tag named last, and when that was.
func (c *cache) tag(ref Reference) (blockdev.Digest, time.Time, bool) {
	b, at, ok := c.get(fileName("tag", ref.Name(), ":"+ref.Tag), 128)
	if !ok {
		return blockdev.Digest{}, at, false
	}
	d, err := blockdev.ParseDigest(string(b))
	return d, at, err == nil
}

func (c *cache) putTag(ref Reference, d blockdev.Digest) error {
	if err := c.put(fileName("tag", ref.Name(), ":"+ref.Tag), []byte(d.String())); err != nil {
		return fmt.Errorf("storing the manifest that tag %s names: %w", ref.Tag, err)
	}
	return nil
}
