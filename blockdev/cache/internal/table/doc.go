// Package table keeps what reads need of an index: where each chunk of a diff lies and
// which digest it has, in about 42 bytes a chunk. A Table does not change; any number of
// goroutines may use it.
package table
