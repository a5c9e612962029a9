// Package host makes the libp2p host that nodes and supernodes talk through:
// TCP, TLS 1.3 and yamux, and nothing else (no QUIC, relay, NAT traversal,
// discovery or ping), an identity kept in a file, and limits that are chosen for
// a datacenter.
//
// # Terms
//
//   - identity: an Ed25519 key; its public half is the peer ID that the other
//     side checks in the TLS handshake.
//   - guard: decides which peers may connect, and what each may use.
//   - address: "ID@host:port". There is no form without the ID: a node that does
//     not know its peer could be fed by any machine.
//
// # Invariants
//
//   - An identity file that cannot be read is an error, never replaced: a new
//     identity would lock out every node that has the old one in its config.
//   - The number of connections and streams has a bound, per peer and in all.
//   - With a guard, no stream handler sees a peer that the guard has not let in.
//   - All addresses asked for are listened on, or New fails.
//   - libp2p's own metrics are registered nowhere unless Config says where.
package host
