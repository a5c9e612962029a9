package tasks_test

import (
	"testing"
	"testing/synctest"

	"github.com/shoalfs/shoal/internal/tasks"
)

// TestClose: Close ends the tasks' context and waits for them, and no task begins after.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := tasks.New()
		ended := false
		if !g.Run(func() { <-g.Context().Done(); synctest.Wait(); ended = true }) {
			t.Fatal("a task does not run")
		}
		g.Close()
		if !ended {
			t.Error("Close does not wait")
		}
		if g.Run(func() { t.Error("a task runs after Close") }) {
			t.Error("a task is said to run after Close")
		}
		g.Close()
	})
}
