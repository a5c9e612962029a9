// Package wire holds the messages that nodes and supernodes exchange: protobuf
// (the .proto files define them, docs/formats.md explains them), each with its
// length in front as a varint, and the codes that carry blockdev's errors.
//
// # Invariants
//
//   - No more than the limit of a message's kind is ever read or allocated for it.
//   - Parse functions check every length and combination that the rest of the
//     code relies on; their errors wrap blockdev.ErrCorrupt.
//   - Texts from the other end are bounded and printable.
//   - Unknown fields are ignored; an unknown error code counts as an internal
//     error of the other end.
package wire

//go:generate ./generate.sh
