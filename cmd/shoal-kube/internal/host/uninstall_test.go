package host

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestScript: paths with odd characters are words of the shell.
func TestScript(t *testing.T) {
	if got, want := quote(`a b'c$d`), `'a b'\''c$d'`; got != want {
		t.Errorf("%s, not %s", got, want)
	}
}

// TestUninstallEnvironment: what fetches layers from registries has the environment of the
// node, with its proxies, on the machine and in the unit of the removal.
func TestUninstallEnvironment(t *testing.T) {
	m := newMachine(t)
	d := Desired{BinDir: t.TempDir()}
	shoal, got := filepath.Join(d.BinDir, "shoal"), filepath.Join(t.TempDir(), "got")
	put(t, m.etc("node.toml"), "version = 1\n")
	put(t, shoal, "#!/bin/sh\necho \"$HTTPS_PROXY\" >"+got+"\nexit 1\n")
	if err := os.Chmod(shoal, 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, m.etc("env"), "# of the datacenter\nHTTPS_PROXY=\"http://proxy:3128\"\n")
	if err := m.Uninstall(t.Context(), d); err == nil || read(t, got) != "http://proxy:3128\n" {
		t.Errorf("HTTPS_PROXY is %q; %v", read(t, got), err)
	}
	if unit := m.removeUnitText("/var/lib/shoal"); !strings.Contains(unit, "\nEnvironmentFile=-"+m.etc("env")+"\n") {
		t.Errorf("the unit has another environment:\n%s", unit)
	}
}

// inMounts runs the script on a machine with these mounts below the node's directory: one
// that FUSE has, whose daemon is gone and whose connection this test holds, as systemd does;
// and one that another process uses, if there is a file "used".
const inMounts = `
set -e
export PATH="$PWD/bin:$PATH"
mkdir -p "$ROOT/fuse" "$ROOT/m/1" "$ROOT/m/2" "$ROOT/backup disk"
mount -i -t fuse.shoal -o fd=3,rootmode=40000,user_id=0,group_id=0 shoal "$ROOT/fuse"
mount -t tmpfs shoal "$ROOT/m/1"
mount -t tmpfs shoal "$ROOT/m/2"
mount -t tmpfs others "$ROOT/backup disk"
if [ -e used ]; then
	(cd "$ROOT/m/1"; exec sleep 1000) & user=$!
	until [ "$(readlink /proc/$user/cwd)" = "$ROOT/m/1" ]; do sleep 0.01; done
fi
status=0
sh uninstall.sh || status=$?
[ ! -e used ] || kill $user
echo "exit status $status"
grep -F " $MOUNTED/" /proc/self/mountinfo | cut -d ' ' -f 5
exit 0
`

// TestUninstallScript: a mount that does not go keeps everything below the node's directory,
// with a line that says what to do; the same script removes all that is shoal's when the mount
// is free. A FUSE mount that nobody serves does not hold it, and neither files nor mounts of
// others are touched.
func TestUninstallScript(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts in a mount namespace of its own: run as root")
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	r := removal{
		Script: at("uninstall.sh"), Failed: at("uninstall.failed"), Shoal: at("bin/shoal"), Args: []string{"a b"}, Control: at("run/node.sock"),
		Systemd: true, Node: "node.service", Own: "own.service", Root: at("ro ot"),
		Names: names, Link: at("link"), Files: []string{at("run/node.sock")}, Last: []string{at("run/node.toml")}, Dirs: []string{at("run"), at("others")}, Limit: 2,
	}
	if err := os.Symlink(r.Root, r.Link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bin", "run", "others", "ro ot"} {
		if err := os.Mkdir(at(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	put(t, at("bin/systemctl"), "#!/bin/sh\necho \"$*\" >>"+at("calls")+"\n[ \"$1\" != is-active ]\n")
	// No container needs the node; it answers as long as there is a file "answers".
	put(t, r.Shoal, "#!/bin/sh\n[ \"$1\" != 'a b' ] || exit 0\n[ \"$*\" = 'status --control "+r.Control+"' ] && [ -e "+at("answers")+" ]\n")
	if err := errors.Join(os.Chmod(at("bin/systemctl"), 0o700), os.Chmod(r.Shoal, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"run/node.sock", "run/node.toml", "others/file", "used", "uninstall.failed",
		"ro ot/identity", "ro ot/.identity-123", "ro ot/shoal.db.damaged", "ro ot/notes",
	} {
		put(t, at(name), name)
	}
	run := func() string {
		t.Helper()
		put(t, r.Script, r.String())
		connection, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer connection.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "unshare", "--mount", "--fork", "--kill-child", "--propagation", "private", "sh", "-c", inMounts)
		cmd.Dir, cmd.ExtraFiles, cmd.WaitDelay = dir, []*os.File{connection}, time.Second
		cmd.Env = append(os.Environ(), "ROOT="+r.Root, "MOUNTED="+r.Mounted())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v (%v)\n%s", err, ctx.Err(), out)
		}
		return string(out)
	}
	left := func(name string) bool {
		_, err := os.Lstat(at(name))
		return err == nil
	}

	out := run()
	disk := r.Mounted() + `/backup\040disk` + "\n"
	if !strings.HasSuffix(out, "exit status 1\n"+r.Mounted()+"/m/1\n"+disk) {
		t.Errorf("with a mount in use:\n%s", out)
	}
	for _, name := range []string{"ro ot/identity", "run/node.sock", "uninstall.sh"} {
		if !left(name) {
			t.Errorf("%s is gone", name)
		}
	}
	why := read(t, r.Failed)
	for _, part := range []string{at("ro ot/m/1") + ".", "Nothing below " + r.Root + " was deleted", "systemctl restart own.service"} {
		if !strings.Contains(why, part) || !strings.Contains(out, why) {
			t.Errorf("it does not say %q: %q", part, why)
		}
	}
	if calls := read(t, at("calls")); strings.Contains(calls, "disable own.service") || !strings.Contains(calls, "clean --what=fdstore node.service") {
		t.Errorf("systemctl: %s", calls)
	}

	if err := os.Remove(at("used")); err != nil {
		t.Fatal(err)
	}
	if out := run(); !strings.HasSuffix(out, "exit status 0\n"+disk) {
		t.Errorf("with no mount in use:\n%s", out)
	}
	for _, name := range []string{"run", "uninstall.sh", "uninstall.failed"} {
		if left(name) {
			t.Errorf("%s is left", name)
		}
	}
	if !left("others/file") || !left("link") {
		t.Error("a file of others is gone")
	}
	if own, err := os.ReadDir(r.Root); err != nil || len(own) != 2 || own[0].Name() != "backup disk" || own[1].Name() != "notes" {
		t.Errorf("below the node's directory are %v, %v", own, err)
	}
	if calls := read(t, at("calls")); !strings.Contains(calls, "disable own.service\ndaemon-reload") {
		t.Errorf("systemctl: %s", calls)
	}

	// Without them, nothing is left.
	if err := errors.Join(os.Remove(at("ro ot/notes")), os.Remove(at("ro ot/backup disk"))); err != nil {
		t.Fatal(err)
	}
	put(t, r.Script, r.String())
	out2, err := exec.CommandContext(t.Context(), "sh", r.Script).CombinedOutput()
	if err != nil || left("ro ot") || left("link") {
		t.Errorf("%v: %s", err, out2)
	}
}

// TestUninstallScriptEnds: a script that waits for containers is ended before another one
// starts, and so is what it runs.
func TestUninstallScriptEnds(t *testing.T) {
	m := newMachine(t)
	put(t, m.script(), "echo; sleep 1000; echo\n")
	cmd := exec.CommandContext(t.Context(), "/bin/sh", m.script())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // as background does
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil { // it runs
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }() // its last process has the pipe
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := m.endScript(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-done:
	case <-ctx.Done():
		t.Error("it goes on")
	}
	if err := m.endScript(ctx); err != nil {
		t.Errorf("with none: %v", err)
	}
}

// TestUninstallScriptKeep: without systemd, a keeper that does not end keeps everything,
// and a process that has the keeper's number by now is not ended.
func TestUninstallScriptKeep(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	start := func(args ...string) *os.Process {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "sh", append([]string{"-c", `trap "" TERM; echo; while :; do sleep 0.1; done`}, args...)...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it is deaf now
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
		return cmd.Process
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"shoal", "keep"}, "does not end"},
		{[]string{"another", "program"}, ""},
	} {
		r := removal{
			Script: at("uninstall.sh"), Failed: at("uninstall.failed"), Shoal: at("shoal"), Keep: start(c.args...).Pid,
			Root: at("root"), Files: []string{at("node.sock")}, Tenths: 3,
		}
		put(t, at("node.sock"), "")
		put(t, r.Shoal, "#!/bin/sh\n[ $# = 0 ]\n")
		if err := os.Chmod(r.Shoal, 0o700); err != nil {
			t.Fatal(err)
		}
		put(t, r.Script, r.String())
		out, err := exec.CommandContext(t.Context(), "sh", r.Script).CombinedOutput()
		_, left := os.Lstat(at("node.sock"))
		if why := read(t, r.Failed); (err != nil) != (c.want != "") || (left == nil) != (c.want != "") || !strings.Contains(why, c.want) {
			t.Errorf("%s: %v\n%s\nleft: %v", c.args, err, out, left)
		}
	}
}
