// Package mirror is the registry mirror that a node serves on loopback, for the
// containerd of its machine: tags, manifests, image indexes and configs come from
// the supernode, so that registries see no more requests the more nodes there are,
// and images that are stored can be pulled while their registry is down.
//
// containerd names it in hosts.toml (docs/operations.md has the file), and says
// with the query parameter ns which registry it means. Whatever the mirror does
// not have, layers above all, and whatever fails, it answers with an error:
// containerd then asks the next host, at last the registry itself, with its own
// credentials. So the mirror passes nothing through, and can only ever help.
//
// # Invariants
//
//   - Bytes go out only after they were hashed against the digest that was asked
//     for, or that the answer to a tag names.
//   - Errors have the form of the OCI distribution specification. None is 401:
//     the mirror takes no credential, it uses the node's own; none is 429, which
//     containerd repeats at once.
//   - Whatever waits, ends: Timeout bounds a request, maxRequests how many of
//     them there are, the rest is turned away at once.
//   - A supernode that finds the mirror in the hosts.toml that it shares with
//     containerd is turned away (508), so that no request goes in circles.
package mirror
