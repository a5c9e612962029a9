// Package registry is a client for OCI registries, for supernodes and for nodes that
// must fetch a layer themselves: it finds out what an image reference means
// (manifest, config, layers) and streams layers, from any offset.
//
// It stands on containerd's own resolver and its hosts.toml directories
// (certs.d), so that mirrors, CAs, client certificates, headers and plain HTTP
// work as users have them configured for containerd, with the same defaults for
// localhost.
//
// # Invariants
//
//   - Nothing of a registry is believed: manifests and configs are read through
//     size limits and hashed against their digest, layer lists and DiffIDs are
//     checked against each other. Layers are passed on unhashed; a caller that stores
//     them hashes them (package ingest).
//   - A credential goes to the registry of the reference and to the token server
//     which that registry names, never to a mirror, never to the target of a
//     redirect, never from an encrypted connection to a plain one. It is kept in
//     memory for minutes at most, and not at all on disk.
//   - No error and no log line holds a credential, a token, a response body or
//     the query of a URL (a redirect to a storage service signs it).
//   - Errors wrap blockdev.ErrNotFound, ErrUnauthorized, ErrUnsupported,
//     ErrUnavailable, ErrCorrupt or the context's error, and name the reference
//     and the cause. *Error has the facts.
//   - What a mirror says instead of giving what is asked for hides nothing: the hosts are
//     asked in containerd's order, and if none gives it, then the error is the last
//     host's, which is the registry itself.
//   - What is cached is cached for one repository: that a manifest is known from
//     one repository says nothing about another.
//   - What many ask for at the same time, a registry is asked once. Requests say
//     with a Via header whose they are, and a node's mirror that answers 508 to
//     that is left out: nothing goes in circles.
//   - Every request ends: a server that sends no byte for Config.Stall is given
//     up.
package registry
