// Package background lets work that nobody waits for have only the processor time
// that nobody else wants. It is for pure computation: a thread of the lowest
// priority may not be let run for a long time, and a thread that waits for a lock that
// it holds waits as long.
package background

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// lowest is the nice value of such work (setpriority(2)).
const lowest = 19

// Goroutine gives the calling goroutine a thread of its own at the lowest
// priority, until the goroutine ends.
func Goroutine() {
	runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
	// Allowed to everybody. Where it is not, the thread competes with others.
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, lowest)
}
