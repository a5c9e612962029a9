package background_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev/background"
)

// niceness is the calling thread's nice value; the system call gives 20 minus it.
func niceness(t *testing.T) int {
	t.Helper()
	n, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Error(err)
	}
	return 20 - n
}

func TestGoroutine(t *testing.T) {
	inside := make(chan int)
	go func() {
		background.Goroutine()
		inside <- niceness(t)
	}()
	if n := <-inside; n != 19 {
		t.Errorf("the goroutine's thread has the nice value %d", n)
	}
	// The thread ended with its goroutine, and took its priority along.
	for range 100 {
		after := make(chan int)
		go func() { after <- niceness(t) }()
		if n := <-after; n == 19 {
			t.Fatal("another goroutine runs at the lowest priority")
		}
	}
}
