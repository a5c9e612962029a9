package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a program that the lab started.
type Process struct {
	Name string
	// Log is the file that has its standard output and error.
	Log string

	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid once done is closed

	stopOnce sync.Once
}

// Start runs a program from Bin or PATH with its output in Dir/log/NAME.log. It
// is stopped at Close, or before by Stop or Kill.
func (l *Lab) Start(name, program string, env []string, args ...string) (*Process, error) {
	p, err := l.start(name, program, env, args...)
	if err == nil {
		l.OnClose(p.Stop)
	}
	return p, err
}

// start is Start of what has a step of its own at Close.
func (l *Lab) start(name, program string, env []string, args ...string) (*Process, error) {
	path, err := l.program(program)
	if err != nil {
		return nil, err
	}
	logFile := l.Path("log", name+".log")
	f, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.Env = append(os.Environ(), env...)
	// Its own siblings first: a containerd needs the shim of its version.
	cmd.Env = append(cmd.Env, "PATH="+filepath.Dir(path)+":"+l.Bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	// A process group of its own, so that a Ctrl-C at the terminal reaches the
	// lab first and everything is stopped in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := l.inHost(cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &Process{Name: name, Log: logFile, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Pid is the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// orSuccess is how a process ended, also if it was well.
func orSuccess(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// Alive returns nil while the process runs, else an error with the end of its log.
func (p *Process) Alive() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended (%w); its log ends:\n%s", p.Name, orSuccess(p.err), Tail(p.Log, 15))
	default:
		return nil
	}
}

// Stop asks the process to end, and kills it after 20 seconds.
func (p *Process) Stop() error {
	var err error
	p.stopOnce.Do(func() { err = p.end(syscall.SIGTERM, 20*time.Second) })
	return err
}

// Kill ends the process at once, as a crash would.
func (p *Process) Kill() error {
	var err error
	p.stopOnce.Do(func() { err = p.end(syscall.SIGKILL, 5*time.Second) })
	return err
}

func (p *Process) end(sig syscall.Signal, patience time.Duration) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s: %w", p.Name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.Name, err)
	}
	<-p.done
	return fmt.Errorf("%s did not end within %v of %v and was killed", p.Name, patience, sig)
}

// RSS returns the resident memory of the process now, and the most it ever
// had, in bytes.
func (p *Process) RSS() (now, peak int64, err error) {
	m, err := p.status()
	return m["VmRSS:"], m["VmHWM:"], err
}

// Memory returns how much of the resident memory is the process's own, in bytes, and how
// much is of files that it has mapped, such as its program and databases: the kernel can
// drop that and read it again.
func (p *Process) Memory() (own, files int64, err error) {
	m, err := p.status()
	return m["RssAnon:"], m["RssFile:"], err
}

// status returns the lines of /proc/PID/status that have sizes, in bytes.
func (p *Process) status() (map[string]int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	if err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return nil, err
		}
		sizes[fields[0]] = kib << 10
	}
	return sizes, nil
}

// Run runs a program from Bin or PATH to its end and returns its standard
// output. The error has its standard error.
func (l *Lab) Run(ctx context.Context, program string, args ...string) (string, error) {
	path, err := l.program(program)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "PATH="+l.Bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = l.inHost(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(path), strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Tail returns the last n lines of a file, or a line that says why not.
func Tail(file string, n int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
