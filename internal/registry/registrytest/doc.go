// Package registrytest has registries for tests: a scripted one in this process
// (Fake), which can misbehave in every way that matters, and Debian's
// docker-registry (StartReal), which keeps the fake honest. Images reach both in
// the same way, through the distribution API (Target.Push).
package registrytest
