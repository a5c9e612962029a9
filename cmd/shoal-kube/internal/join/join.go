// Package join is what supernodes and nodes of a cluster have to know of each other before
// they start: the supernodes' keys, their addresses, and the token.
//
// Both are in Secrets that the chart makes empty, and that the first supernode's start
// fills: no release of the chart has them, so no upgrade can change them, and a supernode
// that has lost its disk is still the one that the nodes know. Nodes may read the second
// Secret only.
//
// # Invariants
//
//   - A key or a token that is in a Secret is never replaced.
//   - All supernodes write the same: the keys of all of them, whichever comes first.
//   - Token and addresses are written together with the revision of the values that they
//     are for. A node reads no others than those of its own revision.
package join

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mr-tron/base58"
	"github.com/pelletier/go-toml/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
)

// Keys of the Secret that nodes read.
const (
	tokenKey      = "token"
	supernodesKey = "supernodes" // ID@host:port, one a line
	revisionKey   = "revision"
)

// Secrets are those of a namespace.
type Secrets interface {
	Get(ctx context.Context, name string, o metav1.GetOptions) (*corev1.Secret, error)
	Update(ctx context.Context, s *corev1.Secret, o metav1.UpdateOptions) (*corev1.Secret, error)
}

// Info is what a machine needs to join.
type Info struct {
	Token string
	// Supernodes are their addresses, ID@host:port.
	Supernodes []string
}

// Values are what the chart's values say of the supernodes.
type Values struct {
	// Revision is another one if one of the other fields is.
	Revision string
	// Addresses are those of all supernodes, host:port.
	Addresses []string
	// Token is the one that the operator wants; empty: a random one, once.
	Token string
}

// Fill writes what is missing in the Secrets keys and join, and returns the key of the
// supernode i, in PEM, and all that the machines need. own, if not nil, is the key that this
// supernode has on its disk, which counts if the Secret has none.
func Fill(ctx context.Context, secrets Secrets, keys, join string, v Values, i int, own []byte) (key []byte, info Info, err error) {
	addresses := v.Addresses
	if i < 0 || i >= len(addresses) {
		return nil, info, fmt.Errorf("this is supernode %d, and the chart has %d", i, len(addresses))
	}
	pems := make([][]byte, len(addresses))
	err = change(ctx, secrets, keys, func(data map[string][]byte) error {
		for n := range addresses {
			name := strconv.Itoa(n)
			if len(data[name]) == 0 && n == i {
				data[name] = own
			}
			if len(data[name]) == 0 {
				b, err := makeKey()
				if err != nil {
					return err
				}
				data[name] = b
			}
			pems[n] = data[name]
		}
		return nil
	})
	if err != nil {
		return nil, info, err
	}
	for n, address := range addresses {
		id, err := ID(pems[n])
		if err != nil {
			return nil, info, fmt.Errorf("key %d of Secret %s: %w", n, keys, err)
		}
		info.Supernodes = append(info.Supernodes, id+"@"+address)
	}
	err = change(ctx, secrets, join, func(data map[string][]byte) error {
		if v.Token != "" {
			data[tokenKey] = []byte(v.Token)
		}
		if len(data[tokenKey]) == 0 {
			secret := make([]byte, 32)
			if _, err := rand.Read(secret); err != nil {
				return err
			}
			data[tokenKey] = []byte(hex.EncodeToString(secret))
		}
		info.Token = string(data[tokenKey])
		data[supernodesKey] = []byte(strings.Join(info.Supernodes, "\n"))
		data[revisionKey] = []byte(v.Revision)
		return nil
	})
	return pems[i], info, err
}

// change changes a Secret, if f changes its data.
func change(ctx context.Context, secrets Secrets, name string, f func(map[string][]byte) error) error {
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		s, err := secrets.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		data := maps.Clone(s.Data)
		if data == nil {
			data = map[string][]byte{}
		}
		if err := f(data); err != nil {
			return err
		}
		if maps.EqualFunc(s.Data, data, slices.Equal[[]byte]) {
			return nil
		}
		s.Data = data
		_, err = secrets.Update(ctx, s, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("secret %s: %w", name, err)
	}
	return nil
}

// Token returns the token in a Secret of the operator's.
func Token(ctx context.Context, secrets Secrets, name string) (string, error) {
	s, err := secrets.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("secret %s: %w", name, err)
	}
	if len(s.Data[tokenKey]) == 0 {
		return "", fmt.Errorf("secret %s has no key %s", name, tokenKey)
	}
	return strings.TrimSpace(string(s.Data[tokenKey])), nil
}

// Read waits until the Secret has token and addresses of this revision: an upgrade starts
// supernodes and nodes at the same time, and until a supernode has started, the Secret has
// those of before. waiting is called with the cause while it waits.
func Read(ctx context.Context, secrets Secrets, name, revision string, waiting func(error)) (info Info, err error) {
	for {
		s, err := secrets.Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			info = Info{Token: string(s.Data[tokenKey]), Supernodes: strings.Fields(string(s.Data[supernodesKey]))}
			switch {
			case info.Token == "" || len(info.Supernodes) == 0:
				err = errors.New("it has no token and no addresses yet; the first supernode that starts writes them")
			case string(s.Data[revisionKey]) != revision:
				err = errors.New("its token and addresses are of other values of the chart; the first supernode that starts with the new values writes them")
			default:
				return info, nil
			}
		}
		err = fmt.Errorf("secret %s: %w", name, err)
		waiting(err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return info, err
		}
	}
}

const pemType = "PRIVATE KEY"

// makeKey makes the identity of a supernode.
func makeKey() ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}), nil
}

// idPrefix of an Ed25519 public key makes the bytes of a peer ID
// (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md).
const idPrefix = "\x00\x24\x08\x01\x12\x20"

// ID is the peer ID of a key in PEM.
func ID(key []byte) (string, error) {
	block, _ := pem.Decode(key)
	if block == nil || block.Type != pemType {
		return "", errors.New("it is not a private key in PEM")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return "", err
	}
	private, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return "", errors.New("it is not an Ed25519 key")
	}
	public, ok := private.Public().(ed25519.PublicKey)
	if !ok {
		return "", errors.New("it has no public key")
	}
	return base58.Encode(append([]byte(idPrefix), public...)), nil
}

// Compose returns a config file: what the operator wrote, with the keys in set, which are
// not the operator's to set, and with those of defaults that the operator has not set.
func Compose(operator string, set, defaults map[string]any) (string, error) {
	c := map[string]any{}
	if err := toml.Unmarshal([]byte(operator), &c); err != nil {
		return "", err
	}
	for key, v := range set {
		if _, ok := c[key]; ok {
			return "", fmt.Errorf("%s: the chart sets this key: remove it", key)
		}
		c[key] = v
	}
	for key, v := range defaults {
		if _, ok := c[key]; !ok {
			c[key] = v
		}
	}
	b, err := toml.Marshal(c)
	return string(b), err
}
