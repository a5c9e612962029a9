// Package fusefs shows local diffs as files: one FUSE mount per node, a flat
// directory, one read-only file per diff, named by the 64 hexadecimal digits of
// its DiffID. EROFS mounts name these files as their data device, so the kernel
// asks this package for content and never for names, attributes or xattrs.
//
// # What opens what
//
// Mount opens /dev/fuse and calls mount(2) itself, and New takes the descriptor
// from its caller. The connection lives as long as a process holds the
// descriptor; the process that serves it may be another one tomorrow. So nothing
// that the kernel may ask for depends on what a process remembers:
//
//   - The node id of a file is made of bytes 0-7 of its DiffID, and the
//     generation and the file handle of bytes 8-15. A READ names both, so it
//     names its DiffID by 128 bits, and no two diffs can be mixed up by an attacker
//     that makes the first 64 bits collide.
//   - Init returns the connection's FUSE_INIT request and the answer. A server
//     that takes over gets them as Options.Init, replays the request without
//     answering, agrees to nothing that the old answer did not have, and then
//     calls Resume.
//   - Requests are read into a table that outlives the process (Options.Pending),
//     for kernels that do not repeat what a dead process has read.
//
// # Invariants
//
//   - READ is answered here, everything else by go-fuse's ProtocolServer.
//   - A loop goroutine never waits for bytes that are not local: such reads go
//     to other goroutines, a bounded number of them.
//   - No diff waits for another. All of a node's reads come through one connection, so
//     the kernel gives out as many requests as it can say (maxBackground). A read that
//     waits for bytes has a place in a line and perhaps a goroutine, both shared among
//     diffs (package turns), and no memory: memory is used for the copy of an answer
//     (Options.SlowBytes). When a diff has as many reads waiting as it may, its next ones
//     fail.
//   - A read is answered, with EIO at the latest Options.ReadTimeout after this process
//     got it from the kernel; the kernel's second try of a read that failed has the
//     time that the first one had, and a second more. A process that takes the
//     connection over begins again: while no process serves it the kernel cannot give
//     out reads.
//   - When the context of Serve has ended, reads whose bytes are not here yet stay
//     unanswered: the next server of the descriptor gets them again, and if
//     there is none, closing the last descriptor fails them.
//   - FUSE_INTERRUPT is refused. The kernel sends one for any signal, and EROFS
//     would turn the answer EINTR into an I/O error for a process that merely
//     got SIGCHLD.
//   - FUSE_PASSTHROUGH is not negotiated: the mount would count as stacked, and
//     EROFS refuses a device on it.
//   - The serving process may mount EROFS over its own files (mount(2) then
//     waits for this package's answer), since the loop goroutines only need a
//     thread each. It must not open the files with os.Open, which calls into the
//     kernel from Go's scheduler and so can take the last thread; nor touch the
//     mount point while it holds a lock that Files needs.
package fusefs
