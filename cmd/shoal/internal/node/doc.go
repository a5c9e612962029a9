// Package node is the daemon of a machine that runs containers: it puts volumes, sources,
// catalogue, snapshotter and registry mirror together. What else only nodes have is in packages below
// it.
//
// # The order of start and end
//
//  1. Volumes. Containers of the process before may be waiting for answers to their reads, so
//     FUSE is served before anything else is done. Reads of what is here are answered, others
//     wait.
//  2. Metrics and health, so that somebody sees how far the node is.
//  3. The upstream. It connects in the background, and other nodes may read what is here.
//  4. The catalogue of images. It takes their indexes from the upstream and their data to
//     the volumes.
//  5. The sources are attached to the volumes: reads that wait go on. This comes after the
//     catalogue, which knows what a supernode is to get again, which layer of which registry
//     a diff is, and which layer may make room for another one.
//  6. The snapshotter, and the registry mirror, at which images are opened that are pulled.
//  7. Serve listens for containerd, commands and pulls. Only then is the node ready.
//
// It ends in the reverse order: first nobody can ask for anything new; then the sources are
// detached, so that a read that fails because they are being closed is left to the next
// process; and FUSE is served until all else has ended.
//
// # A demand read
//
// A read that misses bytes goes through four blockdev.Sources: the one of package volume that
// waits for an upstream, chain (upstream, then registry), swarm (peers, then supernode) and
// uplink (one supernode, then the next). An exchange.Client is at the end of the last two.
package node
