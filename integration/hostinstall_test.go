package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// machine is a box without systemd that has containerd, and gets shoal from shoal-kube.
type machine struct {
	*lab.Box
	t        *testing.T
	desired  map[string]any
	registry *lab.Registry
}

// paths has this machine's containerd be the one of the lab.
const paths = "PATH=/usr/local/bin:$PATH; export PATH; "

// supervise runs containerd, and starts it again whenever it ends.
const supervise = paths + `while :; do containerd & echo $! >/run/containerd.pid; wait $!; done`

// restartContainerd waits for the new one, as systemctl does.
const restartContainerd = paths + `kill $(cat /run/containerd.pid) && sleep 0.5 && until ctr version >/dev/null 2>&1; do sleep 0.1; done`

func newBareMachine(t *testing.T) *machine {
	l := newLab(t)
	ctx := t.Context()
	n := must(l.NewNet(ctx, 1))(t)
	far := l.At(must(n.NewHost(ctx, "super", 0, 0))(t))
	m := &machine{t: t, registry: must(far.StartRegistry(ctx, "registry", l.Path("images"), ""))(t)}
	hosts := fmt.Sprintf("server = %q\n", "http://"+m.registry.Addr)
	noError(t, os.MkdirAll(l.Path("certs", m.registry.Addr), 0o700))
	noError(t, os.WriteFile(l.Path("certs", m.registry.Addr, "hosts.toml"), []byte(hosts), 0o600))
	super := must(far.StartSupernode(ctx, "super", fmt.Sprintf("registry.config_path = %q\n", l.Path("certs"))))(t)

	m.Box = must(l.NewBox(ctx, must(n.NewHost(ctx, "node", 0, 0))(t), 8<<30))(t)
	noError(t, m.Write("/etc/containerd/config.toml", "version = 3\ndisabled_plugins = [\"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\", \"io.containerd.grpc.v1.cri\"]\n"))
	noError(t, m.Write("/etc/containerd/certs.d/"+m.registry.Addr+"/hosts.toml", hosts))
	// What the installer starts has the PATH of a machine.
	for _, p := range []string{"containerd", "ctr", "containerd-shim-runc-v2", "runc"} {
		if _, err := os.Stat(filepath.Join(l.Bin, p)); err == nil {
			m.sh("ln -sf " + filepath.Join(l.Bin, p) + " /usr/local/bin/" + p)
		}
	}
	must(m.Lab.Start("containerd", "sh", nil, "-c", supervise))(t)
	m.wait("containerd", func() error { _, err := m.Lab.Run(ctx, "sh", "-c", paths+"ctr version"); return err })
	m.desired = map[string]any{
		"Token": string(must(os.ReadFile(l.TokenFile()))(t)), "BinDir": "/opt/shoal/bin", "Restart": restartContainerd,
		"Config": m.config(super, ""),
	}
	return m
}

// config is what shoal-kube makes of the chart's values.
func (m *machine) config(super *lab.Supernode, more string) string {
	return fmt.Sprintf("version = 1\nsupernodes = [%q]\n%s", super.Address, more)
}

func (m *machine) wait(what string, f func() error) {
	m.t.Helper()
	noError(m.t, lab.WaitFor(m.t.Context(), what, time.Minute, f))
}

// sh runs a command line on the machine.
func (m *machine) sh(line string) string {
	m.t.Helper()
	return strings.TrimSpace(must(m.Lab.Run(m.t.Context(), "sh", "-c", paths+line))(m.t))
}

// kube runs what shoal-kube runs on a machine, with this program to install.
func (m *machine) kube(command, program string) error {
	m.t.Helper()
	in := m.Lab.Path("desired.json")
	noError(m.t, os.WriteFile(in, must(json.Marshal(m.desired))(m.t), 0o600))
	out, err := m.Lab.Run(m.t.Context(), "sh", "-c", fmt.Sprintf(paths+"exec shoal-kube install %s <%s 3<%s", command, in, program))
	m.t.Logf("%s: %v\n%s", command, err, out)
	return err
}

func (m *machine) install(program string) {
	m.t.Helper()
	noError(m.t, m.kube("on-machine", program))
}

// pids of the processes whose command line is that of a program with these arguments.
func (m *machine) pids(args string) string {
	m.t.Helper()
	return m.sh(`for p in /proc/[0-9]*; do
	c=$(tr '\0' ' ' <$p/cmdline 2>/dev/null) || continue
	[ "${c#/opt/shoal/bin/shoal ` + args + `}" = "$c" ] || echo ${p#/proc/}
done`)
}

func (m *machine) node() string { return m.pids("node") }

func (m *machine) keep() string { return m.pids("keep -- ") }

// TestHostInstall: shoal-kube installs shoal on a machine, changes it under a container
// that reads, goes back from a program that does not work, and takes shoal off again when
// the container has ended.
func TestHostInstall(t *testing.T) {
	m := newBareMachine(t)
	ctx := t.Context()
	first := filepath.Join(bin(t), "shoal")
	var err error
	first, err = filepath.Abs(first)
	noError(t, err)
	before := m.sh("cat /etc/containerd/config.toml; find /etc/containerd/certs.d -type f")

	bad := m.desired["Config"]
	m.desired["Config"] = fmt.Sprint(bad, "cach_quota = 3\n")
	if err := m.kube("on-machine", first); err == nil || !strings.Contains(err.Error(), "cach_quota") {
		t.Errorf("a wrong key: %v", err)
	}
	if out := m.sh("ls /etc/shoal /opt/shoal/bin/shoal 2>/dev/null || true"); out != "" {
		t.Errorf("a config that is wrong has left %s", out)
	}
	m.desired["Config"] = bad

	m.install(first)
	if got := m.sh("stat -c %a /etc/shoal/token"); got != "600" {
		t.Errorf("mode of the token: %s", got)
	}
	ref := m.registry.Addr + "/app:v1"
	guest := must(m.Lab.Guest())(t)
	must(m.registry.Push(ctx, "app", "v1", []string{"/guest", "pause"}, guest, layer(t, file("data", "hello"))))(t)
	m.sh("ctr images pull --snapshotter shoal --hosts-dir /etc/containerd/certs.d " + ref)
	id := filepath.Base(m.Lab.Dir)
	m.sh("ctr run --detach --snapshotter shoal " + ref + " " + id + " >/dev/null 2>&1 </dev/null")
	if got := m.sh("shoal status --output json"); !strings.Contains(got, ref) {
		t.Errorf("the image is not lazy: %s", got)
	}
	execs := 0
	reads := func(when string) {
		t.Helper()
		execs++
		if got := m.sh(fmt.Sprintf("ctr task exec --exec-id x%d %s /guest cat /data", execs, id)); got != "hello" {
			t.Errorf("%s the container reads %q", when, got)
		}
	}
	reads("after the installation")

	node, containerd := m.node(), m.sh("cat /run/containerd.pid")
	m.install(first)
	if m.node() != node || m.sh("cat /run/containerd.pid") != containerd {
		t.Error("an installation that changes nothing has restarted something")
	}
	config := fmt.Sprint(m.desired["Config"])
	m.desired["Config"] = config + "[log]\nlevel = \"DEBUG\"\n"
	m.install(first)
	if m.node() != node {
		t.Error("a key that needs no restart has restarted the node")
	}
	config = "read_timeout = \"50s\"\n" + config
	m.desired["Config"] = config
	m.install(first)
	if m.node() == node {
		t.Error("a key that needs a restart has not restarted the node")
	}
	reads("with another config")

	// The same program with a byte more is another one.
	second := m.Lab.Path("shoal-2")
	noError(t, os.WriteFile(second, append(must(os.ReadFile(first))(t), '\n'), 0o755))
	node, keep := m.node(), m.keep()
	m.install(second)
	if m.node() == node || m.keep() != keep {
		t.Error("the node was not upgraded under its keeper")
	}
	m.sh("cmp " + second + " /opt/shoal/bin/shoal")
	reads("after an upgrade")

	// One that says that each config is right, and then does nothing.
	if err := m.kube("on-machine", "/bin/true"); err == nil || !strings.Contains(err.Error(), "does not get up") {
		t.Errorf("a program that does not work: %v", err)
	}
	m.sh("cmp " + second + " /opt/shoal/bin/shoal")
	reads("after an upgrade that failed")
	m.install(first)
	reads("after going back")

	if err := m.kube("off-machine", first); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("uninstalled under a container: %v", err)
	}
	reads("while the node waits for its end")
	m.install(first)
	reads("after another installation")
	for range 2 {
		if err := m.kube("off-machine", first); err == nil || !strings.Contains(err.Error(), "exit status 3") {
			t.Errorf("uninstalled under a container: %v", err)
		}
	}
	if n := m.sh("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -o '[/]bin/sh /etc/shoal/uninstall.sh ' | wc -l"); n != "1" {
		t.Errorf("%s processes wait for the container", n)
	}
	// A process that containerd does not know keeps a layer mounted.
	m.sh("cd \"$(ls -d /var/lib/shoal/m/* | head -n 1)\" && { sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >/run/user.pid; }")
	m.sh("ctr task kill --signal SIGKILL " + id + " && until ctr container rm " + id + "; do sleep 0.1; done")
	m.wait("the reason why shoal is not removed", func() error {
		_, err := os.Stat(m.Path("/etc/shoal/uninstall.failed"))
		return err
	})
	if err := m.kube("off-machine", first); err == nil || !strings.Contains(err.Error(), "processes still use what is mounted at /var/lib/shoal/m/") {
		t.Errorf("uninstalled under a mount in use: %v", err)
	}
	m.sh("ls /var/lib/shoal/identity /etc/shoal/node.toml /opt/shoal/bin/shoal && kill $(cat /run/user.pid)")
	m.sh("touch /var/lib/shoal/notes")
	noError(t, m.kube("off-machine", first))
	if left := m.sh("ls -A /var/lib/shoal"); left != "notes" {
		t.Errorf("below the node's directory is %q", left)
	}
	m.sh("rm -r /var/lib/shoal")
	m.wait("the removal of shoal", func() error {
		out, err := m.Lab.Run(ctx, "sh", "-c", "ls -d /etc/shoal /opt/shoal/bin/shoal /var/lib/shoal /run/shoal 2>/dev/null; grep \" /var/lib/shoal\" /proc/self/mountinfo; true")
		if err == nil && strings.TrimSpace(out) != "" {
			err = errors.New(out)
		}
		return err
	})
	if left := m.node(); left != "" {
		t.Errorf("node %s is left", left)
	}
	if after := m.sh("cat /etc/containerd/config.toml; find /etc/containerd/certs.d -type f"); after != before {
		t.Errorf("containerd's files are left as\n%s\nwere\n%s", after, before)
	}
	noError(t, m.kube("off-machine", first))
	if _, err := os.Stat(m.Path("/etc/shoal")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
