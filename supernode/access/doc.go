// Package access decides which peers may read a repository: callers that the repository's registry
// lets in.
//
// # Terms
//
// A peer is a node by its libp2p identity, or "" for the process that the supernode lives
// in. The grace is for how long an old yes counts while the registry is down: while it gives
// no answer, or a server error. A rate limit is an answer.
//
// # Invariants
//
//   - A yes counts for Config.TTL. It is kept by credential and repository: callers that
//     show the same credential would get the same answer, so a thousand nodes with one pull
//     secret cost the registry one request. A repository that anybody may pull needs one
//     anonymous request for everybody.
//   - Only while the registry is down an older yes counts, for Config.Grace: for a
//     repository that anybody might pull, for everybody; else for the peer that had access,
//     if it shows the credential that the registry let in then.
//   - A no takes back what a peer would have kept, also if the peer did not wait for it.
//   - What is wrong with one repository extends no access to another one: each is asked about.
//     That a registry gave no answer for one makes waits for its others shorter.
//   - What is remembered for that is bounded, and neither a peer nor a registry can take the
//     room of others.
//   - On disk it is kept which peer had access to which repository with which credential,
//     hashed and salted. Of a credential nothing else leaves the memory.
//   - A question is asked once for all callers that want to know the same at the same time.
package access
