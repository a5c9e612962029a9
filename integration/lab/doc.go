// Package lab sets up what the integration tests, the benchmarks and the demo
// run against: a real registry, a real containerd with runc, real shoal
// processes, and links between them with a rate and a delay.
//
// Everything listens on loopback and lives below one directory. Close undoes it
// all, in reverse order: processes are stopped by the pid that was started,
// mounts below the directory are unmounted, the directory is removed.
//
// Needs root, and the programs that `make setup` installs (Debian's
// docker-registry and runc) or builds (containerd).
package lab
