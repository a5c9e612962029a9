package roster_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/roster"
)

// Example lets a node join a supernode, and then an image's group.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := join(dir); err != nil {
		log.Fatal(err)
	}
	// Output:
	// members: 1, this node's images: 1
	// members of the group, this node itself included: 1
}

func join(dir string) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	// The supernode. The list makes the token that nodes join with, and guards the host.
	key, err := host.LoadIdentity(filepath.Join(dir, "supernode"))
	if err != nil {
		return err
	}
	list, err := roster.New(roster.Config{Dir: dir, Key: key})
	if err != nil {
		return err
	}
	super, err := host.New(host.Config{Key: key, Listen: []string{"127.0.0.1:0"}, Guard: list})
	if err != nil {
		return err
	}
	list.Start(super)
	defer func() { err = errors.Join(err, list.Close(), super.Close()) }()

	// A node.
	if key, err = host.LoadIdentity(filepath.Join(dir, "node")); err != nil {
		return err
	}
	node, err := members.New(members.Config{
		Supernodes: []peer.AddrInfo{{ID: super.ID(), Addrs: super.Addrs()}},
		Token: func() (string, error) {
			tokens, err := members.ReadTokens(list.TokenFile())
			return append(tokens, "")[0], err
		},
	})
	if err != nil {
		return err
	}
	h, err := host.New(host.Config{Key: key, Listen: []string{"127.0.0.1:0"}, Guard: node})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Close(), h.Close()) }()
	if err := node.Start(h); err != nil {
		return err
	}
	if err := node.Ready(ctx, super.ID()); err != nil {
		return err
	}

	// The supernode gives a grant out with the indexes of an image, and the node joins the
	// image's group with it. A view of the group comes when there is one.
	manifest, diff := blockdev.Sum([]byte("manifest")), blockdev.Sum([]byte("diff"))
	grant, err := list.Grant(h.ID().String(), manifest, "registry.example.com")
	if err != nil {
		return err
	}
	changed := node.Changed()
	node.Join(manifest, []blockdev.Digest{diff}, grant)
	for node.View(manifest) == nil {
		select {
		case <-changed:
			changed = node.Changed()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	fmt.Printf("members: %d, this node's images: %d\n", len(list.Members()), list.Members()[0].Images)
	for _, group := range node.Groups(diff) {
		fmt.Println("members of the group, this node itself included:", len(node.View(group).Members))
	}
	return nil
}
