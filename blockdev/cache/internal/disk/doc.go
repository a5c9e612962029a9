// Package disk is what the cache asks of the file system beside reading and writing: locks,
// syncs, the page cache, and which boot this is. It knows nothing of diffs. Small files
// that are replaced are package durable's.
package disk
