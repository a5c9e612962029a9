// Package mount mounts block images (EROFS metadata over a masked diff) and says
// what is mounted.
//
// # How
//
// Probe says beforehand what this kernel cannot do: EROFS without support of
// extended attributes, of those for security or of ACLs shows an image's files
// without them, and no error.
//
// Mount passes the two files to mount(2) directly (Linux 6.12 with
// CONFIG_EROFS_FS_BACKED_BY_FILE). Where the kernel wants block devices (Linux
// 6.4, which brought EROFS blocks of 512 bytes, to 6.11), it puts a read-only
// loop device over each file. Nothing is run, since mount(8) would pick a loop
// device by itself, and would not set up the second one.
//
// # Invariants
//
//   - Mounts are read-only and have no other flag. Content that is set-uid, a
//     device or executable is the image's business: a bind mount of a
//     single-layer image inherits the flags, and a container with nosuid would
//     not work. The directory above the mount points keeps other users out.
//   - A loop device is autocleared: it disappears with the mount that uses it,
//     however that comes to its end, and with the process if it dies before.
//   - Every mount point that this package looks at is absolute and free of
//     symbolic links below the directory that it was asked about.
//   - The process that mounts may be the one that serves the data file through
//     FUSE.
//   - Nothing here opens a file below a mount, so a dead or slow server cannot
//     hold it up; the exceptions are Dead and Mount itself.
package mount
