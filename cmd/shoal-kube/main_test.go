package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// asProgram has the test binary be the program.
const asProgram = "SHOAL_KUBE_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestFromMemory: the node may serve the image that this program is in, so the program does
// not need its file while it replaces or watches the node.
func TestFromMemory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts in a mount namespace of its own: run as root")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"image", "more", "pod"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.CommandContext(t.Context(), "cp", self, filepath.Join(dir, "image/shoal-kube")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// It waits for what it is to do.
	const inPod = "mount -t overlay -o lowerdir=image:more overlay pod && exec pod/shoal-kube install on-machine"
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "sh", "-c", inPod)
	var out strings.Builder
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, append(os.Environ(), asProgram+"=1"), &out, &out
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exe := ""
	for until := time.Now().Add(30 * time.Second); !strings.HasPrefix(exe, "/memfd:") && time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		exe, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid)) // while it starts again, it has none
	}
	_ = in.Close()
	if werr := cmd.Wait(); !strings.HasPrefix(exe, "/memfd:") {
		t.Errorf("it runs from %s (%v); it ended with %v: %s", exe, err, werr, &out)
	}
}
