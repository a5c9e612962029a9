package blockdev

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// Digest is a SHA-256. It names diffs (DiffIDs), layers, manifests and chunks.
type Digest [sha256.Size]byte

const digestPrefix = "sha256:"

// Sum returns the digest of data.
func Sum(data []byte) Digest { return sha256.Sum256(data) }

// ParseDigest reads the OCI form, "sha256:" and 64 lower-case hexadecimal
// digits. Any other algorithm or form is an error.
func ParseDigest(s string) (Digest, error) {
	enc, ok := strings.CutPrefix(s, digestPrefix)
	d, isHex := ParseHex(enc)
	if !ok || !isHex {
		return Digest{}, fmt.Errorf("digest %.80q is not sha256:<64 hexadecimal digits>", s)
	}
	return d, nil
}

// ParseHex reads what Hex returns, and nothing else: 64 lower-case hexadecimal
// digits.
func ParseHex(s string) (d Digest, ok bool) {
	if len(s) != hex.EncodedLen(len(d)) || strings.ToLower(s) != s {
		return Digest{}, false
	}
	if _, err := hex.Decode(d[:], []byte(s)); err != nil {
		return Digest{}, false
	}
	return d, true
}

// String returns the OCI form, which ParseDigest reads.
func (d Digest) String() string { return digestPrefix + d.Hex() }

// Hex returns the 64 hexadecimal digits alone, as file names use them.
func (d Digest) Hex() string { return hex.EncodeToString(d[:]) }

// MarshalText writes the OCI form.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads the OCI form.
func (d *Digest) UnmarshalText(b []byte) error {
	v, err := ParseDigest(string(b))
	if err != nil {
		return err
	}
	*d = v
	return nil
}
