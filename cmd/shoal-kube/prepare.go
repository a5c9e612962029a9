package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/join"
	"github.com/shoalfs/shoal/internal/durable"
)

// prepareOptions are the flags of shoal-kube prepare.
type prepareOptions struct {
	keys, join, token   string
	revision            string
	services, addresses []string
	config, out, root   string
}

func newPrepareCommand() *cobra.Command {
	var o prepareOptions
	cmd := &cobra.Command{
		Use:   "prepare",
		Short: "Write the key, token and config of a supernode, before it starts in its pod",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return o.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&o.keys, "keys", "", "Secret with the keys of the supernodes")
	f.StringVar(&o.join, "join", "", "Secret with the token and the supernodes' addresses, for the machines")
	f.StringVar(&o.revision, "revision", "", "what the Secret says that its token and addresses are for; install waits for it")
	f.StringVar(&o.token, "token", "", "Secret with a token of the operator's; empty: a random token")
	f.StringArrayVar(&o.services, "service", nil, "Service of a supernode, in the order of the supernodes")
	f.StringArrayVar(&o.addresses, "address", nil, "host:port of a supernode, instead of Services")
	f.StringVar(&o.config, "config", "", "file with keys of supernode.toml")
	f.StringVar(&o.out, "out", "/etc/shoal", "directory for supernode.toml and token")
	f.StringVar(&o.root, "root", "/var/lib/shoal-supernode", "root of the supernode")
	return cmd
}

// port is where supernodes of the chart listen.
const port = 7700

func (o prepareOptions) run(ctx context.Context) error {
	client, err := newClient("")
	if err != nil {
		return err
	}
	namespace := os.Getenv("POD_NAMESPACE")
	pod := os.Getenv("POD_NAME")
	i, err := strconv.Atoi(pod[strings.LastIndexByte(pod, '-')+1:])
	if err != nil {
		return fmt.Errorf("POD_NAME is %q: it has no number at its end", pod)
	}
	addresses := o.addresses
	for _, name := range o.services {
		s, err := client.Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("service %s: %w", name, err)
		}
		addresses = append(addresses, net.JoinHostPort(s.Spec.ClusterIP, strconv.Itoa(port)))
	}
	secrets := client.Secrets(namespace)
	values := join.Values{Revision: o.revision, Addresses: addresses}
	if o.token != "" {
		if values.Token, err = join.Token(ctx, secrets, o.token); err != nil {
			return err
		}
	}
	identity := filepath.Join(o.root, "identity")
	own, err := os.ReadFile(identity)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, info, err := join.Fill(ctx, secrets, o.keys, o.join, values, i, own)
	if err != nil {
		return err
	}
	operator, err := os.ReadFile(o.config)
	if err != nil {
		return err
	}
	set := map[string]any{
		"version": 1, "root": o.root, "token_file": filepath.Join(o.out, "token"),
		"listen": []string{fmt.Sprintf(":%d", port)}, "metrics_address": ":7701",
	}
	if len(info.Supernodes) > 1 {
		set["siblings"] = info.Supernodes
	}
	quota, err := storeQuota(o.root)
	if err != nil {
		return err
	}
	config, err := join.Compose(string(operator), set, map[string]any{"store": map[string]any{"quota": quota}})
	if err != nil {
		return fmt.Errorf("supernode.config of the values: %w", err)
	}
	return errors.Join(
		durable.Replace(identity, key, 0o600),
		durable.Replace(filepath.Join(o.out, "token"), []byte(info.Token+"\n"), 0o600),
		durable.Replace(filepath.Join(o.out, "supernode.toml"), []byte(config), 0o644))
}

// storeQuota is 90 % of the volume that dir is on, as supernode.toml has it.
func storeQuota(dir string) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	bytes := st.Blocks * uint64(st.Bsize) / 10 * 9 //nolint:gosec // a size is not negative
	return fmt.Sprintf("%dMiB", bytes>>20), nil
}
