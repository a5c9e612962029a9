package roster

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/shoalfs/shoal/internal/durable"
	"github.com/shoalfs/shoal/p2p/members"
)

// MakeToken writes a file with a random token to path, readable by its owner
// alone, unless there is a file already. It is complete or not there at all.
func MakeToken(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	var secret [32]byte
	if _, err := rand.Read(secret[:]); err != nil {
		return fmt.Errorf("make token: %w", err)
	}
	// Durable: else a power cut may take the token away that the operator has copied to the nodes.
	err := durable.Create(path, []byte(hex.EncodeToString(secret[:])+"\n"), 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil // somebody else was quicker
	}
	if err != nil {
		return fmt.Errorf("make token %s: %w", path, err)
	}
	return nil
}

// tokenHash is what is kept of a token.
type tokenHash [sha256.Size]byte

// tokens are those of a file. They are read again when the file has changed.
type tokens struct {
	path string

	mu     sync.Mutex
	stamp  stamp
	err    error // of the last reading; what was read before counts
	hashes []tokenHash
}

// stamp changes when a file does.
type stamp struct {
	mod  time.Time
	size int64
	ino  uint64
}

func openTokens(path string) (*tokens, error) {
	t := &tokens{path: path}
	if _, err := t.reload(); err != nil {
		return nil, err
	}
	return t, nil
}

// reload reads the file if it has changed. A file that cannot be read is an error
// once, and leaves all as it was.
func (t *tokens) reload() (changed bool, err error) {
	at, err := stampOf(t.path)
	t.mu.Lock()
	same := err == nil && t.err == nil && at == t.stamp
	before := t.err
	t.mu.Unlock()
	if same {
		return false, nil
	}
	var hashes []tokenHash
	if err == nil {
		var list []string
		list, err = members.ReadTokens(t.path)
		for _, s := range list {
			hashes = append(hashes, sha256.Sum256([]byte(s)))
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err = err
	if err != nil {
		if before != nil && before.Error() == err.Error() {
			return false, nil // said already
		}
		return false, fmt.Errorf("the tokens that were read before stay valid: %w", err)
	}
	t.stamp, t.hashes = at, hashes
	return true, nil
}

func stampOf(path string) (stamp, error) {
	st, err := os.Stat(path)
	if err != nil {
		return stamp{}, fmt.Errorf("token file: %w", err)
	}
	return stamp{mod: st.ModTime(), size: st.Size(), ino: inode(st)}, nil
}

// check says whether the token is one of those in the file, in a time that tells
// nothing about them.
func (t *tokens) check(token string) (tokenHash, bool) {
	h := tokenHash(sha256.Sum256([]byte(token)))
	return h, t.has(h)
}

func (t *tokens) has(h tokenHash) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	found := 0
	for i := range t.hashes {
		found |= subtle.ConstantTimeCompare(h[:], t.hashes[i][:])
	}
	return found == 1
}
