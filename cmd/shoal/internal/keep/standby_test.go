package keep

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// flag sets something that daemons look at, until the function that it returns is called.
func (k *kept) flag(name string) (end func()) {
	k.t.Helper()
	path := filepath.Join(k.dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		k.t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			k.t.Error(err)
		}
	}
}

// waited says whether the log names no program that did not wait for its turn.
func (k *kept) waited() bool { return !strings.Contains(k.log.String(), "does not wait") }

// TestStandby: the next program is loaded before the one that runs is told to end, and
// goes on when that one has ended. Daemons check that there is no other one.
func TestStandby(t *testing.T) {
	k := start(t)
	first := k.hello(1)
	k.expect("ready 1")
	k.install("next")
	k.signal(Upgrade)
	k.expect("loading")
	k.expect("daemon 1 got terminated")
	second := k.hello(2)
	if second.size == first.size || !k.waited() {
		t.Errorf("%+v has followed %+v; keep says\n%s", second, first, k.log)
	}
	k.expect("ready 2")
	// It is started again as any other.
	if err := syscall.Kill(second.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if third := k.hello(3); third.size != second.size {
		t.Errorf("%+v has followed %+v", third, second)
	}
}

// TestStandbyDies: a standby that is killed while the old program ends is not an upgrade
// that has failed.
func TestStandbyDies(t *testing.T) {
	k := start(t)
	first := k.hello(1)
	k.expect("ready 1")
	k.install("next")
	end := k.flag("slow-to-end")
	k.signal(Upgrade)
	pid, err := strconv.Atoi(strings.TrimPrefix(k.expect("loading "), "loading "))
	if err != nil {
		t.Fatal(err)
	}
	k.expect("daemon 1 got terminated") // so the standby waits
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for syscall.Kill(pid, 0) == nil { // until keep has waited for it
		time.Sleep(time.Millisecond)
	}
	end()
	if second := k.hello(2); second.size == first.size {
		t.Errorf("not the new program; keep says\n%s", k.log)
	}
	k.expect("ready 2")
}

// TestUnaware: a program that knows nothing of turns finds the files in use, ends, and
// is started when they are free. It changes nothing of what the old program uses.
func TestUnaware(t *testing.T) {
	k := start(t)
	k.expect("ready 1")
	end := k.flag("unaware")
	k.signal(Upgrade)
	k.expect("locked")
	if l := k.expect("daemon 1 got terminated"); !strings.HasSuffix(l, "nonblocking: true") {
		t.Errorf("the standby has changed a listener of the program that runs: %s", l)
	}
	k.hello(2)
	k.expect("ready 2")
	if k.waited() {
		t.Errorf("keep says\n%s", k.log)
	}
	end()
	k.signal(Upgrade)
	k.hello(3)
	k.expect("ready 3")
}

// TestStoredLate: the standby gets what the old program stores while the standby waits.
func TestStoredLate(t *testing.T) {
	k := start(t)
	k.expect("ready 1")
	defer k.flag("stores-at-the-end")()
	k.signal(Upgrade)
	standby := strings.TrimPrefix(k.expect("loading "), "loading ")
	k.expect("daemon 1 got terminated")
	k.expect("late is kept")
	if second := k.hello(2); strconv.Itoa(second.pid) != standby {
		t.Errorf("process %d has followed, and the standby was %s", second.pid, standby)
	}
	k.expect("ready 2")
}

// TestCrashBeforeTurn: the program that runs is killed while the next one loads, which
// is then started as after any upgrade.
func TestCrashBeforeTurn(t *testing.T) {
	k := start(t)
	first := k.hello(1)
	k.expect("ready 1")
	k.install("next")
	end := k.flag("never-loads")
	k.signal(Upgrade)
	k.expect("loading")
	end()
	if err := syscall.Kill(first.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if second := k.hello(2); second.size == first.size {
		t.Error("not the new program")
	}
	k.expect("ready 2")
}

// TestStopBeforeTurn: keep ends together with a standby.
func TestStopBeforeTurn(t *testing.T) {
	k := start(t)
	k.expect("ready 1")
	defer k.flag("never-loads")()
	k.signal(Upgrade)
	k.expect("loading")
	k.signal(syscall.SIGTERM)
	k.expect("daemon 1 got terminated")
	for l := range k.lines { // which every process has open
		t.Errorf("%q after the end", l)
	}
}
