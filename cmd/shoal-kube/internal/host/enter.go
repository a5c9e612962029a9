package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// path is where programs of a machine are.
const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/bin"

// Enter runs this program again, with args, as a process of the machine: in the mount,
// network and other namespaces of its process 1, with none of the pod's environment. So
// paths, symbolic links among them, are the machine's. files are its descriptors from 3
// on. The pod needs hostPID and privileged.
func Enter(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer, files []*os.File, args ...string) error {
	done := make(chan error, 1)
	go func() {
		// The thread is the machine's from here on, and ends with this goroutine.
		runtime.LockOSThread()
		if err := enter(); err != nil {
			done <- err
			return
		}
		cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = stdin, stdout, stderr, files
		cmd.Env, cmd.Dir = []string{path}, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		done <- cmd.Run()
	}()
	return <-done
}

func enter() error {
	if os.Getpid() == 1 {
		return errors.New("this process is the first one of its pod, not a process of the machine: the pod needs hostPID: true")
	}
	first, err := unix.PidfdOpen(1, 0)
	if err != nil {
		return fmt.Errorf("process 1: %w", err)
	}
	defer func() { _ = unix.Close(first) }()
	// A thread shares its working directory with others, unless it is told not to.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("enter the machine's namespaces: %w: the container needs privileged: true", err)
	}
	const all = unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP
	if err := unix.Setns(first, all); err != nil {
		return fmt.Errorf("enter the machine's namespaces: %w: the container needs privileged: true", err)
	}
	return nil
}

// leaveCgroups moves this process, and with it all that it starts from here on, to the
// root of each hierarchy, so that these processes do not end with the pod.
func leaveCgroups() error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	var errs []error
	moved := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// 36 35 98:0 /root /mount options - type source options
		fields := strings.Fields(lines.Text())
		i := 0
		for i < len(fields) && fields[i] != "-" {
			i++
		}
		if i+1 >= len(fields) || !strings.HasPrefix(fields[i+1], "cgroup") || fields[3] != "/" {
			continue
		}
		procs := filepath.Join(fields[4], "cgroup.procs")
		if err := os.WriteFile(procs, []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			errs = append(errs, err)
			continue
		}
		moved++
	}
	if moved == 0 {
		return fmt.Errorf("leave the pod's cgroup: %w", errors.Join(append(errs, errors.New("no hierarchy of cgroups takes this process"))...))
	}
	return nil
}
