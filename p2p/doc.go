// Package p2p is how the machines of a datacenter talk to each other: nodes to
// supernodes and nodes to nodes, over the same protocols.
//
// # Parts
//
//   - wire: the messages (protobuf), their framing and limits, and error codes
//   - host: the libp2p host: TCP, TLS 1.3 and yamux, an Ed25519 identity, limits
//   - route: which peer to ask for a chunk (pure: no I/O, no clock)
//   - members: a node's membership: joining supernodes, groups, which peers may connect
//   - roster: a supernode's side of it: which nodes may join, and which nodes learn of which
//   - swarm: a node among others: it asks the peers that route names, and answers them
//   - exchange: the chunk and the index protocol, server and client
//   - uplink: several supernodes as one source
//
// # Terms
//
//   - supernode address: "ID@host:port", the peer ID and where to dial it. The
//     supernode prints it, the operator pastes it into the node's config.
//   - demand, prefetch: a read that a container waits for, and one that no read waits for.
//     They use separate streams and separate limits at both ends.
//   - busy: a server's answer, in one round trip, when a limit is reached. It
//     does not queue what it cannot serve soon.
//
// # Invariants
//
//   - Every connection is encrypted, and both ends have proven their peer ID.
//   - All that comes from the other end is hostile until checked: each message
//     has a hard size limit, each buffer a bound, each wait a deadline.
//   - A chunk's bytes are never believed here: the caller's Deliver checks the
//     digest, and a sender whose bytes fail that check loses the stream.
//   - Unknown fields are ignored, so that a later version may add some. What is
//     not compatible gets another protocol ID ("/shoal/chunk/2").
//   - p2p imports blockdev and nothing else of shoal.
package p2p
