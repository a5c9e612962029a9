package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Default daemons have the config file that `shoal config default` prints, but for the
// paths below Dir and the keys in set, whose values are TOML. Their ports are the
// default ones, so each has a machine of its own (Lab.At).

// StartDefaultSupernode starts a supernode below Dir/name.
func (l *Lab) StartDefaultSupernode(ctx context.Context, name string, set map[string]string) (*Supernode, error) {
	s := &Supernode{Control: l.Path(name, "control.sock"), Metrics: "127.0.0.1:7701", lab: l}
	cfg, err := l.defaultConfig(ctx, name, "supernode", set, map[string]string{
		"root": strconv.Quote(l.Path(name)), "control_address": strconv.Quote(s.Control), "token_file": strconv.Quote(l.TokenFile()),
	})
	if err != nil {
		return nil, err
	}
	if s.Process, err = l.Start(name, "shoal", nil, "supernode", "--config", cfg); err != nil {
		return nil, err
	}
	return s, WaitFor(ctx, "supernode", 20*time.Second, func() error {
		b, err := os.ReadFile(s.Log)
		if s.Address = addressLine.FindString(string(b)); err == nil && s.Address == "" {
			err = errors.New("it has not printed its address")
		}
		return errors.Join(err, s.Alive())
	})
}

// Printed returns the addresses that the supernode has printed for nodes' configs.
func (s *Supernode) Printed() ([]string, error) {
	b, err := os.ReadFile(s.Log)
	return addressLine.FindAllString(string(b), -1), err
}

// At returns the supernode's address at that host, a name or an IP address.
func (s *Supernode) At(host string) string {
	id, _, _ := strings.Cut(s.Address, "@")
	return id + "@" + net.JoinHostPort(host, "7700")
}

// StartDefaultNode starts a node below Dir/name. supernodes are addresses.
func (l *Lab) StartDefaultNode(ctx context.Context, name string, supernodes []string, set map[string]string) (*Node, error) {
	n := &Node{
		Socket: l.Path(name, "shoal.sock"), Control: l.Path(name, "control.sock"), Root: l.Path(name, "r"),
		Metrics: "127.0.0.1:7702", Mirror: "127.0.0.1:7704", MirrorCA: l.Path(name, "r", "mirror-ca.pem"), lab: l,
	}
	cfg, err := l.defaultConfig(ctx, name, "node", set, map[string]string{
		"root": strconv.Quote(n.Root), "address": strconv.Quote(n.Socket), "control_address": strconv.Quote(n.Control),
		"token_file": strconv.Quote(l.TokenFile()), "supernodes": `["` + strings.Join(supernodes, `", "`) + `"]`,
	})
	if err != nil {
		return nil, err
	}
	if n.Process, err = l.Start(name, "shoal", nil, "node", "--config", cfg); err != nil {
		return nil, err
	}
	return n, n.waitUp(ctx)
}

func (l *Lab) defaultConfig(ctx context.Context, name, kind string, sets ...map[string]string) (string, error) {
	text, err := l.Run(ctx, "shoal", "config", "default", kind)
	if err != nil {
		return "", err
	}
	for _, set := range sets {
		for key, value := range set {
			line := regexp.MustCompile(`(?m)^ *` + key + ` *=.*$`)
			if !line.MatchString(text) {
				return "", fmt.Errorf("the default config of a %s has no %s", kind, key)
			}
			text = line.ReplaceAllLiteralString(text, key+" = "+value)
		}
	}
	return l.writeFile(name+".toml", text)
}
