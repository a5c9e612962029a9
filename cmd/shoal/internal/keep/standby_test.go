package keep

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
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

// TestUnaware: a program that knows nothing of turns finds the files in use, ends, and
// is started when they are free.
func TestUnaware(t *testing.T) {
	k := start(t)
	k.expect("ready 1")
	end := k.flag("unaware")
	k.signal(Upgrade)
	k.expect("locked")
	k.expect("daemon 1 got terminated")
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

// TestStoredLate: what the program stores after the standby was started is there for the
// next one.
func TestStoredLate(t *testing.T) {
	k := start(t)
	k.expect("ready 1")
	defer k.flag("stores-at-the-end")()
	k.signal(Upgrade)
	k.expect("daemon 1 got terminated")
	k.expect("late is kept")
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
