package mirror

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/durable"
)

const (
	// CAFile is the name, below a node's root, of the certificate that containerd's
	// hosts.toml names as ca.
	CAFile = "mirror-ca.pem"
	// keyFile has its private key, for root alone.
	keyFile = "mirror-ca.key"

	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 90 * 24 * time.Hour
)

// Authority is a certificate authority that signs for the mirror of one node, and
// is trusted for nothing else. It is safe for concurrent use.
type Authority struct {
	cert  *x509.Certificate
	key   crypto.Signer
	names []string // hosts of the certificates
	now   func() time.Time

	mu   sync.Mutex
	leaf *tls.Certificate
}

// OpenAuthority reads the authority below dir, or makes one if there is none, or
// if it is unreadable or about to expire: containerd reads CAFile again at each
// pull. address is the mirror's host:port. log may be nil.
func OpenAuthority(dir, address string, log *slog.Logger) (*Authority, error) {
	return openAuthority(dir, address, log, time.Now)
}

func openAuthority(dir, address string, log *slog.Logger, now func() time.Time) (*Authority, error) {
	defaults.Log(&log)
	a := &Authority{names: hosts(address), now: now}
	err := a.load(dir)
	if err == nil {
		return a, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		log.Warn("cannot use the mirror's certificate authority; a new one is made", "error", err)
	}
	if err := a.make(dir); err != nil {
		return nil, fmt.Errorf("the mirror's certificate authority: %w", err)
	}
	return a, nil
}

// hosts are the names by which a mirror is asked.
func hosts(address string) []string {
	names := []string{"localhost", "127.0.0.1", "::1"}
	if h, _, err := net.SplitHostPort(address); err == nil && h != "" {
		names = append(names, h)
	}
	return names
}

func (a *Authority) load(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, keyFile))
	if err != nil {
		return err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return fmt.Errorf("%s has no key in it", keyFile)
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return fmt.Errorf("%s: %w", keyFile, err)
	}
	if b, err = os.ReadFile(filepath.Join(dir, CAFile)); err != nil {
		return err
	}
	if block, _ = pem.Decode(b); block == nil {
		return fmt.Errorf("%s has no certificate in it", CAFile)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", CAFile, err)
	case !key.PublicKey.Equal(cert.PublicKey):
		return fmt.Errorf("the key in %s does not match the certificate in %s", CAFile, keyFile)
	case a.now().Add(2 * leafLife).After(cert.NotAfter):
		return fmt.Errorf("%s ends at %s", CAFile, cert.NotAfter)
	}
	a.cert, a.key = cert, key
	return nil
}

func (a *Authority) make(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := a.template(caLife)
	t.Subject = pkix.Name{CommonName: "shoal mirror of this machine"}
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	a.key = key
	kb, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	// The key first: a certificate without its key is made again at the next start.
	if err := durable.Replace(filepath.Join(dir, keyFile), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kb}), 0o600); err != nil {
		return err
	}
	return durable.Replace(filepath.Join(dir, CAFile), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

func (a *Authority) template(life time.Duration) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		serial = big.NewInt(a.now().UnixNano())
	}
	return &x509.Certificate{SerialNumber: serial, NotBefore: a.now().Add(-time.Hour), NotAfter: a.now().Add(life)}
}

// certificate is tls.Config.GetCertificate. The key of what it returns is in memory
// alone, and lives for months at most.
func (a *Authority) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.leaf != nil && a.now().Add(leafLife/3).Before(a.leaf.Leaf.NotAfter) {
		return a.leaf, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := a.template(leafLife)
	t.Subject = pkix.Name{CommonName: "shoal mirror"}
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, name := range a.names {
		if ip := net.ParseIP(name); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	a.leaf = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return a.leaf, nil
}

// TLS is the server's side: HTTP/1.1, since a config that is held back is sent in
// pieces, each of which is to be seen by containerd.
func (a *Authority) TLS() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: a.certificate, NextProtos: []string{"http/1.1"}}
}
