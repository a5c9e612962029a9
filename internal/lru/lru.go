// Package lru bounds maps, one way for all packages: golang-lru, without the errors of sizes
// that are constants here. Time-outs stay with the values: golang-lru's expirable maps have a
// goroutine that never ends, and no clock of a test.
package lru

import (
	"math"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// Map is a map in which the entry that was added or got longest ago makes room for a new one.
// It is not for use by several goroutines.
type Map[K comparable, V any] = simplelru.LRU[K, V]

// New returns a Map of at most size entries.
func New[K comparable, V any](size int) *Map[K, V] { return NewEvict[K, V](size, nil) }

// NewEvict is New with a function that is called with each entry that goes, whether it makes
// room or is removed.
func NewEvict[K comparable, V any](size int, gone func(K, V)) *Map[K, V] {
	m, _ := simplelru.NewLRU(max(size, 1), gone) // fails for a size of 0
	return m
}

// Unbounded is NewEvict for a Map whose owner counts something else than entries.
func Unbounded[K comparable, V any](gone func(K, V)) *Map[K, V] { return NewEvict(math.MaxInt, gone) }
