package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/shoalfs/shoal/cmd/shoal/internal/install"
)

// TestInstallRestart: the unit that runs containerd is restarted, but only if something has
// changed or containerd does not answer that it has shoal; and systemd reads its settings again
// if they have changed, also without a restart.
func TestInstallRestart(t *testing.T) {
	dir := t.TempDir()
	calls := filepath.Join(dir, "calls")
	// In the place of the machine's own: it has one active unit, and writes down what it is told.
	script := "#!/bin/sh\n[ \"$1\" = is-active ] && { [ \"$3\" = k3s-agent ]; exit; }\necho \"$*\" >>" + calls + "\n"
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	k3s := install.Host{Socket: filepath.Join(dir, "no.sock"), Services: []string{"k3s", "k3s-agent"}, Unit: "/unit", Record: "/record"}
	changed := install.Plan{Changes: []install.Change{{Path: "/unit"}}}
	for _, c := range []struct {
		o    installOptions
		plan install.Plan
		want string
	}{
		{installOptions{restart: true}, changed, "daemon-reload\nrestart k3s-agent\n"},
		{installOptions{}, changed, "daemon-reload\n"},
		{installOptions{restart: true}, install.Plan{}, "restart k3s-agent\n"}, // nothing answers at the socket
		{installOptions{}, install.Plan{}, ""},
		{installOptions{restart: true, uninstall: true}, install.Plan{}, ""},
		{installOptions{restart: true, uninstall: true}, install.Plan{Changes: []install.Change{{Path: "/record"}}}, ""},
		{installOptions{restart: true, command: "echo restart >>" + calls}, changed, "daemon-reload\nrestart\n"},
	} {
		var out bytes.Buffer
		reload(t.Context(), &out, k3s, c.plan)
		restarted, err := restart(t.Context(), &out, c.o, k3s, c.plan, !c.o.uninstall)
		if err != nil || restarted != strings.Contains(c.want, "restart") {
			t.Fatalf("%+v: restarted %v, %v", c.o, restarted, err)
		}
		b, err := os.ReadFile(calls)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if string(b) != c.want {
			t.Errorf("%+v: %q, not %q; it says %s", c.o, b, c.want, &out)
		}
		if err := os.RemoveAll(calls); err != nil {
			t.Fatal(err)
		}
	}
	k3s.Services = []string{"containerd"}
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte("#!/bin/sh\necho no such unit >&2\nexit 5\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := restart(t.Context(), &bytes.Buffer{}, installOptions{restart: true}, k3s, changed, true)
	if err == nil || !strings.Contains(err.Error(), "no such unit") || !strings.Contains(err.Error(), "files are written") {
		t.Errorf("error %v", err)
	}
}

// TestInstallConfirm: a containerd that does not get up after its restart, or reads another file
// than the one that was changed, is an error that says what to do. TestHostInstall in
// integration has one that reads it.
func TestInstallConfirm(t *testing.T) {
	h := install.Host{Config: "/etc/containerd/config.toml", Socket: filepath.Join(t.TempDir(), "containerd.sock")}
	check := func(known bool, want string) {
		t.Helper()
		err := confirm(t.Context(), h, known, time.Millisecond)
		if (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "--uninstall")) {
			t.Errorf("error %v", err)
		}
	}
	check(true, "it does not answer: containerd at "+h.Socket)
	check(false, "it does not answer")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", h.Socket)
	if err != nil {
		t.Fatal(err)
	}
	// It has no plugins.
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		return errors.Join(s.RecvMsg(new(emptypb.Empty)), s.SendMsg(new(emptypb.Empty)))
	}))
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	check(true, "does not know shoal, so it reads another file than /etc/containerd/config.toml")
	check(false, "")
}

// TestInstallHost: flags count before what the distribution has, and a config alone means a
// containerd of none.
func TestInstallHost(t *testing.T) {
	h, err := installOptions{distribution: "rke2", config: "/c", service: "s"}.host(install.Node{})
	if err != nil || h.Name != "rke2" || h.Config != "/c" || !slices.Equal(h.Services, []string{"s"}) || h.Socket != "/run/k3s/containerd/containerd.sock" {
		t.Errorf("%+v, %v", h, err)
	}
	if h, err := (installOptions{config: "/c"}).host(install.Node{}); err != nil || h.Name != "" || h.Program != "containerd" {
		t.Errorf("%+v, %v", h, err)
	}
	for _, uninstall := range []bool{false, true} {
		_, err := installOptions{distribution: "talos", uninstall: uninstall}.host(install.Node{})
		if !errors.Is(err, install.ErrUnsupported) || strings.Contains(err.Error(), "CRICustomizationConfig") == uninstall {
			t.Errorf("error %v", err)
		}
	}
}

// TestInstallAgain: the command that containerd's unit runs has the flags that say where
// files are, and no others.
func TestInstallAgain(t *testing.T) {
	cmd, _, err := newInstallCommand().Find([]string{"containerd"})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.ParseFlags([]string{"--restart", "--node-config", "/etc/shoal/node.toml", "--config=config.toml", "--distribution=eks"}); err != nil {
		t.Fatal(err)
	}
	config, err := filepath.Abs("config.toml")
	if err != nil {
		t.Fatal(err)
	}
	command, err := installOptions{}.again(cmd)
	if err != nil || !slices.Equal(command[1:], []string{"install", "containerd", "--distribution=eks", "--config=" + config, "--node-config=/etc/shoal/node.toml"}) || !filepath.IsAbs(command[0]) {
		t.Errorf("%q, %v", command, err)
	}
}
