package host

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/internal/durable"
)

// pemType is the PEM block of a PKCS #8 key, as openssl reads and writes it.
const pemType = "PRIVATE KEY"

// maxIdentity is more bytes than any Ed25519 key in PEM has.
const maxIdentity = 4 << 10

// LoadIdentity reads the identity in the file at path, and makes one if there is
// none: mode 0600, complete or not there at all, and never in the place of a
// file that exists. The directory must exist. A file that holds no Ed25519 key,
// or that others may read, is an error.
func LoadIdentity(path string) (crypto.PrivKey, error) {
	key, err := readIdentity(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := createIdentity(path); err != nil {
			return nil, fmt.Errorf("make identity %s: %w", path, err)
		}
		key, err = readIdentity(path)
	}
	if err != nil {
		return nil, fmt.Errorf("identity %s: %w", path, err)
	}
	return key, nil
}

func readIdentity(path string) (crypto.PrivKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	if perm := st.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("mode %04o lets other users read the private key; if no other user has read it, chmod 600 the file", perm)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxIdentity+1))
	if err != nil {
		return nil, err
	}
	const damaged = "no Ed25519 key in PEM (PKCS #8): restore the file from a backup, or delete it to get " +
		"a new identity, which must then be made known wherever the old one is"
	block, rest := pem.Decode(b)
	if block == nil || block.Type != pemType || len(rest) > 0 {
		return nil, errors.New(damaged)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", damaged, err)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, errors.New(damaged)
	}
	return crypto.UnmarshalEd25519PrivateKey(key)
}

// createIdentity writes a new key to path. A file that another process has made since
// stays, and is no error.
func createIdentity(path string) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	err = durable.Create(path, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}), 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// Key returns the Ed25519 public key that a peer ID stands for; false: it stands
// for another kind of key, which no peer of ours has.
func Key(id peer.ID) (key [ed25519.PublicKeySize]byte, ok bool) {
	// An ID of a short key is the key, in libp2p's protobuf, as an "identity"
	// multihash (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md).
	if len(id) != len(idPrefix)+len(key) || string(id[:len(idPrefix)]) != idPrefix {
		return key, false
	}
	return [ed25519.PublicKeySize]byte([]byte(id[len(idPrefix):])), true
}

// FromKey returns the peer ID of an Ed25519 public key.
func FromKey(key [ed25519.PublicKeySize]byte) peer.ID {
	return peer.ID(idPrefix + string(key[:]))
}

// idPrefix: identity multihash, 36 bytes; field 1 (type) is 1 (Ed25519), field 2
// (data) has 32 bytes.
const idPrefix = "\x00\x24\x08\x01\x12\x20"
