// Package integration tests shoal as its users meet it: real shoal processes
// under a real containerd with runc, images from a real registry, FUSE and EROFS
// mounts. It is a module of its own, so that what only tests need stays out of
// the product's go.mod. `make test-integration` runs it.
package integration
