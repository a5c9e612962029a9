package keep

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
)

// The test binary is keep, what keep launches through, and the daemon.
const roleEnv = "SHOAL_KEEP_TEST"

func TestMain(m *testing.M) {
	var err error
	switch {
	case len(os.Args) > 2 && os.Args[1] == "launch":
		err = Launch(context.Background(), os.Args[2:])
	case os.Getenv(roleEnv) == "":
		os.Exit(m.Run())
	case len(os.Args) > 1 && os.Args[1] == "daemon":
		err = runDaemon(os.Args[2])
	default:
		err = runKeep(os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runKeep(command []string) error {
	signals := make(chan os.Signal, 16)
	notify(signals)
	return Run(Config{
		Command: command, Launcher: []string{"launch"},
		StartTimeout: 5 * time.Second, StopTimeout: 2 * time.Second,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}, signals)
}

// runDaemon says who it is and what it was given, stores a file with its number,
// and does what comes in through a FIFO in dir.
func runDaemon(dir string) error {
	flag := func(name string) bool {
		_, err := os.Stat(filepath.Join(dir, name))
		return err == nil
	}
	fmt.Println("loading", os.Getpid())
	if flag("never-loads") {
		select {}
	}
	if flag("unaware") {
		if err := os.Unsetenv(fdstore.StandbyEnv); err != nil {
			return err
		}
	}
	store, err := fdstore.Open(context.Background())
	if err != nil {
		return err
	}
	// As a node's: there are never two.
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		fmt.Println("locked")
		return err
	}
	number := 1
	f := store.Take("number")
	if f != nil {
		b, err := io.ReadAll(io.NewSectionReader(f, 0, 100))
		if err != nil {
			return err
		}
		if number, err = strconv.Atoi(string(b)); err != nil {
			return err
		}
		number++
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/exe", &st); err != nil {
		return err
	}
	never := flag("never-ready")
	if late := store.Take("late"); late != nil {
		fmt.Println("late is kept")
		defer late.Close()
	}
	fmt.Printf("daemon %d size %d pid %d listen %q kept %v\n", number, st.Size, os.Getpid(), os.Getenv("LISTEN_FDS"), store.Kept())
	fd, err := unix.MemfdCreate("number", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	next := os.NewFile(uintptr(fd), "number")
	if _, err := next.WriteString(strconv.Itoa(number)); err != nil {
		return err
	}
	if err := store.DropRest(); err != nil {
		return err
	}
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	listener := os.NewFile(uintptr(socket), "listener")
	defer listener.Close()
	for name, f := range map[string]*os.File{"number": next, "listener": listener, fmt.Sprint("unknown to the next one, ", number): next} {
		if err := store.Keep(name, f); err != nil {
			return err
		}
	}
	if never {
		select {}
	}
	signals := make(chan os.Signal, 4)
	notify(signals)
	if flag("ready-at-the-end") {
		fmt.Println("waiting", number)
		<-signals
		if err := store.Ready(); err != nil {
			return err
		}
		fmt.Println("ready", number)
		select {}
	}
	// When the second has returned, keep knows of the first.
	if err := errors.Join(store.Ready(), store.Drop("nothing")); err != nil {
		return err
	}
	fmt.Println("ready", number)
	if flag("ready-and-gone") {
		os.Exit(8)
	}
	for s := range signals {
		flags, err := unix.FcntlInt(uintptr(socket), unix.F_GETFL, 0)
		if err != nil {
			return err
		}
		fmt.Printf("daemon %d got %v; its listener is nonblocking: %v\n", number, s, flags&unix.O_NONBLOCK != 0)
		switch s {
		case syscall.SIGTERM:
			for flag("slow-to-end") {
				time.Sleep(time.Millisecond)
			}
			if flag("stores-at-the-end") {
				return store.Keep("late", next)
			}
			return nil
		case syscall.SIGQUIT:
			os.Exit(7)
		}
	}
	return nil
}

// kept is a keep under test.
type kept struct {
	t     *testing.T
	cmd   *exec.Cmd
	dir   string
	path  string // of the daemon's program
	lines chan string
	log   *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func start(t *testing.T) *kept {
	t.Helper()
	dir := t.TempDir()
	k := &kept{t: t, dir: dir, path: filepath.Join(dir, "daemon"), lines: make(chan string, 100), log: &lockedBuffer{}}
	k.install("")
	k.cmd = exec.Command("/proc/self/exe", k.path, "daemon", dir)
	k.cmd.Env = append(os.Environ(), roleEnv+"=1")
	k.cmd.Stderr = k.log
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			k.lines <- s.Text()
		}
		close(k.lines)
	}()
	t.Cleanup(func() {
		_ = k.cmd.Process.Signal(syscall.SIGTERM)
		for range k.lines {
		}
		err := k.cmd.Wait()
		t.Logf("keep ended: %v\n%s", err, k.log)
	})
	return k
}

// install puts a program where the daemon is: this one with something behind it,
// which shows in its size.
func (k *kept) install(tail string) {
	k.t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		k.t.Fatal(err)
	}
	if err := os.WriteFile(k.path+".new", append(b, tail...), 0o700); err != nil {
		k.t.Fatal(err)
	}
	if err := os.Rename(k.path+".new", k.path); err != nil {
		k.t.Fatal(err)
	}
}

// expect returns the next line that begins with prefix.
func (k *kept) expect(prefix string) string {
	k.t.Helper()
	for {
		select {
		case l, ok := <-k.lines:
			if !ok {
				k.t.Fatalf("keep ended; no %q", prefix)
			}
			if strings.HasPrefix(l, prefix) {
				return l
			}
		case <-time.After(30 * time.Second):
			k.t.Fatalf("no %q; keep says\n%s", prefix, k.log)
		}
	}
}

type hello struct {
	number, size, pid int
	listen            string
	kept              bool
}

// hello reads how a daemon introduces itself.
func (k *kept) hello(number int) (h hello) {
	k.t.Helper()
	l := k.expect(fmt.Sprintf("daemon %d size", number))
	if _, err := fmt.Sscanf(l, "daemon %d size %d pid %d listen %q kept %t", &h.number, &h.size, &h.pid, &h.listen, &h.kept); err != nil {
		k.t.Fatalf("%q: %v", l, err)
	}
	return h
}

func (k *kept) signal(s syscall.Signal) {
	k.t.Helper()
	if err := k.cmd.Process.Signal(s); err != nil {
		k.t.Fatal(err)
	}
}

func TestRestart(t *testing.T) {
	k := start(t)
	h := k.hello(1)
	if h.listen != "" || !h.kept {
		t.Errorf("first: %+v", h)
	}
	for n := 2; n < 6; n++ {
		k.expect(fmt.Sprint("ready ", n-1))
		if err := syscall.Kill(h.pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// It can count only if it got its file back; LISTEN_PID was right, then.
		h = k.hello(n)
	}
	k.expect("ready 5")
	if fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", k.cmd.Process.Pid)); err != nil || len(fds) > 16 {
		t.Errorf("keep has %d descriptors open (%v)", len(fds), err)
	}
}

func TestSignals(t *testing.T) {
	k := start(t)
	k.expect("ready 1")
	k.signal(syscall.SIGHUP)
	k.expect("daemon 1 got hangup")
	k.signal(syscall.SIGUSR1)
	k.expect("daemon 1 got user defined signal 1")
	k.signal(syscall.SIGQUIT) // the daemon ends with 7, and is started again
	k.expect("ready 2")
	if !strings.Contains(k.log.String(), "exit status 7") {
		t.Error("the log does not say how the daemon ended")
	}
	k.signal(syscall.SIGTERM)
	k.expect("daemon 2 got terminated")
	if _, more := <-k.lines; more {
		t.Error("started again after SIGTERM")
	}
	if err := k.cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestUpgrade replaces the program, by one that works, by ones that do not, and
// by nothing.
func TestUpgrade(t *testing.T) {
	k := start(t)
	first := k.hello(1)
	k.expect("ready 1")
	// Without the signal, the old program runs, also where its file is gone.
	k.install("new version")
	if err := syscall.Kill(first.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if h := k.hello(2); h.size != first.size {
		t.Errorf("a crash has upgraded: %+v, was %+v", h, first)
	}
	k.expect("ready 2")
	k.signal(Upgrade)
	k.expect("daemon 2 got terminated")
	second := k.hello(3)
	if second.size == first.size {
		t.Error("not the new program")
	}
	k.expect("ready 3")

	flag := filepath.Join(k.dir, "never-ready")
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.install("a version that does not get ready")
	k.signal(Upgrade)
	if h := k.hello(4); h.size == second.size {
		t.Error("not the newest program")
	}
	if err := os.Remove(flag); err != nil {
		t.Fatal(err)
	}
	if h := k.hello(5); h.size != second.size {
		t.Errorf("after a failed upgrade: %+v, want the program of %+v", h, second)
	}
	k.expect("ready 5")

	// One that ends at once.
	b, err := os.ReadFile("/bin/false")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(k.path+".new", b, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(k.path+".new", k.path); err != nil {
		t.Fatal(err)
	}
	k.signal(Upgrade)
	if h := k.hello(6); h.size != second.size {
		t.Errorf("after a failed upgrade: %+v, want the program of %+v", h, second)
	}
	k.expect("ready 6")

	// A script, and no file at all: the daemon does not even notice.
	if err := os.WriteFile(k.path, []byte("#!/bin/sh\nexec sleep 100\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	k.signal(Upgrade)
	if err := os.Remove(k.path); err != nil {
		t.Fatal(err)
	}
	k.signal(Upgrade)
	k.signal(syscall.SIGUSR1)
	k.expect("daemon 6 got user defined signal 1")
	// Signals that wait together come in the order of their numbers.
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(k.log.String(), "no upgrade"); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("the log does not say that there was no upgrade")
		}
	}
}

// TestCrashLoop: a daemon that does not get ready is started more and more
// slowly.
func TestCrashLoop(t *testing.T) {
	k := &keeper{Config: Config{Log: slog.New(slog.DiscardHandler)}, path: "x"}
	want := []time.Duration{0, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond}
	for i, w := range want {
		if got := k.after(nil); got != w {
			t.Errorf("end %d: %v, want %v", i, got, w)
		}
	}
	for range 100 {
		if got := k.after(nil); got > maxPause {
			t.Fatalf("pause of %v", got)
		}
	}
	k.wasReady, k.since = true, time.Now().Add(-steady)
	if got := k.after(nil); got != 0 {
		t.Errorf("an accident: %v", got)
	}
}

// TestCrashAfterReady: a daemon that gets ready and ends at once, each time, is no busy
// loop.
func TestCrashAfterReady(t *testing.T) {
	k := start(t)
	k.expect("ready 1")
	flag := filepath.Join(k.dir, "ready-and-gone")
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.signal(syscall.SIGQUIT)
	// On a machine that is busy one of them may live for longer than steady, and the
	// count begins anew.
	for n := 2; !strings.Contains(k.log.String(), "in=200ms"); n++ {
		k.expect(fmt.Sprint("ready ", n))
	}
	if err := os.Remove(flag); err != nil {
		t.Fatal(err)
	}
	if free := strings.Count(strings.Split(k.log.String(), "in=100ms")[0], "in=0s"); free < freeRestarts {
		t.Errorf("a pause after %d restarts, want %d without one", free, freeRestarts)
	}
}

// TestPauses: a daemon that ends before it is ready, after some that ended soon after, has
// the next longer pause and not the longest.
func TestPauses(t *testing.T) {
	k := &keeper{Config: Config{Log: slog.New(slog.DiscardHandler)}}
	const unready, short, long = 0, 1, 2
	for i, life := range []struct {
		kind int
		want time.Duration
	}{
		{unready, 0}, {unready, firstPause}, {unready, 2 * firstPause}, {long, 0},
		{short, 0}, {short, 0}, {short, 0}, {short, 0}, {short, firstPause},
		{unready, 2 * firstPause}, {short, 4 * firstPause}, {unready, 8 * firstPause},
		{long, 0}, {unready, firstPause}, {unready, 2 * firstPause},
		{short, 0}, {short, 0}, {short, 4 * firstPause}, {short, 8 * firstPause}, {short, 16 * firstPause},
		{short, 32 * firstPause}, {short, maxPause},
	} {
		k.wasReady, k.since = life.kind != unready, time.Now()
		if life.kind == long {
			k.since = k.since.Add(-steady)
		}
		if got := k.after(nil); got != life.want {
			t.Errorf("life %d: the next one begins in %v, want %v", i, got, life.want)
		}
	}
}

// TestReadyDuringStop: what a daemon says when it is to end does not give it more time
// for that, in the middle of an upgrade either.
func TestReadyDuringStop(t *testing.T) {
	k := start(t)
	k.expect("ready 1")
	if err := os.WriteFile(filepath.Join(k.dir, "ready-at-the-end"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k.signal(Upgrade)
	k.expect("waiting 2")
	k.signal(syscall.SIGTERM)
	k.expect("ready 2")
	done := make(chan struct{})
	go func() {
		for range k.lines {
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("a daemon that does not end is not killed")
	}
	if !strings.Contains(k.log.String(), "the program did not end in time and is killed") {
		t.Error("the log does not say that the daemon was killed")
	}
}

// TestStrangers: messages of others do not count.
func TestStrangers(t *testing.T) {
	fd, address, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	k := &keeper{Config: Config{Log: slog.New(slog.DiscardHandler)}, socket: fd, pid: os.Getpid() + 1, ready: make(chan struct{}, 1)}
	t.Setenv("NOTIFY_SOCKET", address)
	store, err := fdstore.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	tell := func() {
		t.Helper()
		done := make(chan error, 1)
		go func() { done <- store.Keep("null", null) }()
		for {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				if err := store.Ready(); err != nil {
					t.Fatal(err)
				}
				k.drain()
				return
			default:
				k.drain()
			}
		}
	}
	tell()
	if len(k.stored) != 0 || len(k.ready) != 0 {
		t.Errorf("a stranger's messages were taken: %v", k.stored)
	}
	k.pid = os.Getpid()
	tell()
	tell()
	if len(k.stored) != 1 || k.stored[0].name != "null" || len(k.ready) != 1 {
		t.Errorf("stored: %v", k.stored)
	}
	for range 2 * maxStored {
		k.handle([]string{"FDSTORE=1", "FDNAME=x"}, []*os.File{null})
	}
	if len(k.stored) != maxStored {
		t.Errorf("%d descriptors stored", len(k.stored))
	}
	k.stored = k.stored[:1]
	if err := k.stored[0].file.Close(); err != nil {
		t.Error(err)
	}
}

func notify(c chan<- os.Signal) { signal.Notify(c, Signals()...) }
