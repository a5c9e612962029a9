// Package exchangetest checks implementations of package exchange's contracts.
//
//   - TestProvider is the conformance suite of exchange.Provider, which every Provider
//     of the project runs: the one over a store of chunks, and a node of the swarm.
//
// # Invariants
//
//   - The suite asks for nothing that the comments in package exchange do not promise;
//     where both disagree, the comments are right.
package exchangetest
