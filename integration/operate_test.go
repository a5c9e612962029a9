package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestReadiness: what lives is not always ready: a supernode before its store is open,
// and a node that no supernode has let in yet. A node that has been ready stays so when
// its supernode goes away.
func TestReadiness(t *testing.T) {
	bin(t) // skips without root
	l := newLab(t)
	ctx := t.Context()
	super := must(l.StartSupernode(ctx, "super", ""))(t)
	type prober interface {
		Probe(ctx context.Context, path string) (int, string, error)
	}
	want := func(p prober, path string, code int, text string) {
		t.Helper()
		noError(t, lab.WaitFor(ctx, path, 20*time.Second, func() error {
			got, said, err := p.Probe(ctx, path)
			if err == nil && (got != code || !strings.Contains(said, text)) {
				err = fmt.Errorf("%d %q, want %d %q", got, said, code, text)
			}
			return err
		}))
	}
	want(super, "/readyz", http.StatusOK, "ok")
	noError(t, super.Stop())
	node := must(l.StartNode(ctx, "node", super.Address, ""))(t)
	want(node, "/healthz", http.StatusOK, "ok")
	want(node, "/readyz", http.StatusServiceUnavailable, "no supernode has let this node in")
	alone := must(l.StartNode(ctx, "alone", "", ""))(t)
	want(alone, "/readyz", http.StatusOK, "ok")

	// A pipe in the place of the store's index: it is read when somebody writes to it.
	index := l.Path("super", "store", "index.db")
	noError(t, os.Rename(index, index+".away"))
	noError(t, syscall.Mkfifo(index, 0o600))
	p := must(l.Start("super", "shoal", nil, "supernode", "--config", l.Path("super.toml")))(t)
	want(super, "/healthz", http.StatusOK, "ok")
	want(super, "/readyz", http.StatusServiceUnavailable, "opens its store")
	want(node, "/readyz", http.StatusServiceUnavailable, "no supernode has let this node in")
	noError(t, p.Kill())
	noError(t, os.Rename(index+".away", index))
	super = must(l.RestartSupernode(ctx, super))(t)
	want(super, "/readyz", http.StatusOK, "ok")
	want(node, "/readyz", http.StatusOK, "ok")
	noError(t, super.Stop())
	want(node, "/readyz", http.StatusOK, "ok")
}

// newRig starts a registry, a supernode and a node, without containerd.
func newRig(t *testing.T, nodeConfig, superConfig string) *site {
	t.Helper()
	bin(t) // skips without root
	s := &site{Lab: newLab(t)}
	s.registry = must(s.StartRegistry(t.Context(), "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", superConfig))(t)
	s.node = must(s.StartNode(t.Context(), "node", s.supernode.Address, nodeConfig))(t)
	return s
}

// pull says how a pull of an image goes on the node.
func (s *site) pull(t *testing.T, repository string) error {
	t.Helper()
	return s.node.Pull(t.Context(), must(s.registry.Image(t.Context(), repository, "v1"))(t))
}

// configure changes a daemon's config file.
func (s *site) configure(t *testing.T, name string, change func(string) string) {
	t.Helper()
	file := s.Path(name + ".toml")
	before := string(must(os.ReadFile(file))(t))
	after := change(before)
	if after == before {
		t.Fatalf("%s is not changed:\n%s", file, before)
	}
	noError(t, os.WriteFile(file, []byte(after), 0o600))
}

// logged waits for a daemon's log to have a line with all words.
func logged(t *testing.T, file string, words ...string) {
	t.Helper()
	noError(t, lab.WaitFor(t.Context(), "log line", 20*time.Second, func() error {
		b, err := os.ReadFile(file)
		for line := range strings.Lines(string(b)) {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				return nil
			}
		}
		return errors.Join(err, fmt.Errorf("%s has no line with %q:\n%s", file, words, lab.Tail(file, 10)))
	}))
}

// TestReload: SIGHUP and shoal reload have both daemons go by what their configs say
// now, as far as that is possible while they run, and say the rest by its key. A config
// with an error changes nothing.
func TestReload(t *testing.T) {
	s := newRig(t, "[images]\nnever = [\"docker.io/never/*\"]\n", "")
	ctx := t.Context()
	for i := range 5 {
		s.push(t, fmt.Sprintf("team%d/app", i), layer(t, file("f", bigContent(i))))
	}
	noError(t, s.pull(t, "team0/app"))
	super, node := s.supernode.Pid(), s.node.Pid()

	// The node's rules for images, by a signal; and a key that has to wait.
	s.configure(t, "node", func(c string) string {
		return "cache_quota = \"1GiB\"\n" + strings.Replace(c, "docker.io/never/*", s.registry.Addr+"/team1/*", 1) + "[log]\nlevel = \"debug\"\n"
	})
	noError(t, syscall.Kill(node, syscall.SIGHUP))
	logged(t, s.node.Log, "config reloaded", "images.never", "log.level")
	logged(t, s.node.Log, "need a restart", "cache_quota")
	if err := s.pull(t, "team1/app"); err == nil {
		t.Error("an image that the config names since the reload is lazy")
	}
	if out := must(s.Run(ctx, "shoal", "reload", "--control", s.node.Control))(t); out != "needs a restart: cache_quota\n" {
		t.Errorf("a second reload says %q", out)
	}
	logged(t, s.node.Log, "level=DEBUG", "config file read")

	// What the supernode may ask for, by the command.
	allow := func(c string) string {
		return c + "[registry]\nallowed = [\"" + s.registry.Addr + "/team3/*\"]\nmax_download = \"1GiB\"\n"
	}
	s.configure(t, "super", allow)
	if out := must(s.Run(ctx, "shoal", "reload", "--control", s.supernode.Control))(t); out != "changed: registry.allowed\nchanged: registry.max_download\n" {
		t.Errorf("reload says %q", out)
	}
	if err := s.pull(t, "team2/app"); err == nil {
		t.Error("an image that the supernode may not ask for is lazy")
	}
	if out := must(s.Run(ctx, "shoal", "status", "--control", s.node.Control))(t); !strings.Contains(out, "team2/app") || !strings.Contains(out, "registry.allowed") {
		t.Errorf("the node's status does not say why:\n%s", out)
	}
	noError(t, s.pull(t, "team3/app"))

	// An error in the file: nothing changes.
	s.configure(t, "super", func(c string) string { return strings.Replace(c, "allowed = [", "allowed = [\"quay.io\", ", 1) })
	if out, err := s.Run(ctx, "shoal", "reload", "--control", s.supernode.Control); err == nil || !strings.Contains(err.Error()+out, `registry.allowed: "quay.io"`) {
		t.Errorf("an error in the config: %v %q", err, out)
	}
	logged(t, s.supernode.Log, "config not reloaded", "registry.allowed")
	s.configure(t, "super", func(c string) string { return "[[[" })
	noError(t, syscall.Kill(super, syscall.SIGHUP))
	logged(t, s.supernode.Log, "config not reloaded", "line 1")
	if err := s.pull(t, "team4/app"); err == nil {
		t.Error("a config that does not parse has lifted a rule")
	}
	if err := errors.Join(s.node.Alive(), s.supernode.Alive()); err != nil || s.node.Pid() != node || s.supernode.Pid() != super {
		t.Errorf("a reload has ended a daemon: %v", err)
	}
}

// stored is a line of `shoal store list --output json`.
type stored struct {
	Layer   string
	Size    int64
	Pinned  bool
	Images  []string
	Origins []string
}

// TestStore: an operator sees what is stored, the largest first, removes an image or a
// layer, and pins an image over a restart.
func TestStore(t *testing.T) {
	s := newRig(t, "", "")
	ctx := t.Context()
	shared := layer(t, file("s", bigContent(1)))
	own := layer(t, file("o", bigContent(2)+bigContent(3)))
	a, b := s.push(t, "team/a", shared, own), s.push(t, "team/b", shared)
	noError(t, s.pull(t, "team/a"))
	noError(t, s.pull(t, "team/b"))
	run := func(args ...string) (string, error) {
		return s.Run(ctx, "shoal", append(append([]string{"store"}, args...), "--control", s.supernode.Control)...)
	}
	list := func() (all []stored) {
		t.Helper()
		noError(t, json.Unmarshal([]byte(must(run("list", "--output", "json"))(t)), &all))
		return all
	}
	refused := func(want string, args ...string) {
		t.Helper()
		if out, err := run(args...); err == nil || !strings.Contains(err.Error()+out, want) {
			t.Errorf("%v: %v %q, want %q", args, err, out, want)
		}
	}
	all := list()
	if len(all) != 2 || all[0].Size < all[1].Size || !slices.Equal(all[0].Images, []string{a}) || !slices.Equal(all[1].Images, []string{a, b}) ||
		!slices.Equal(all[0].Origins, []string{s.registry.Addr + "/team/a"}) || all[0].Pinned {
		t.Fatalf("%+v", all)
	}
	if out := must(run("list"))(t); !strings.Contains(out, "LAYER") || !strings.Contains(out, all[0].Layer) || !strings.Contains(out, a) {
		t.Errorf("the table:\n%s", out)
	}
	refused("is not a stored layer or diff", "remove", "sha256:"+strings.Repeat("0", 64))
	refused("is not pinned", "unpin", b)

	// Pinned: neither by name nor by digest, and not after a restart.
	must(run("pin", b))(t)
	s.supernode = must(s.Lab.RestartSupernode(ctx, stopped(t, s.supernode)))(t)
	if all = list(); len(all) != 2 || all[0].Pinned || !all[1].Pinned || !slices.Equal(all[1].Images, []string{b}) {
		t.Errorf("after a restart: %+v", all)
	}
	refused("unpin it first", "remove", b)
	refused("unpin the image first", "remove", all[1].Layer)
	// The image's own layer goes, the pinned one stays.
	if out := must(run("remove", a))(t); out != "removed: "+all[0].Layer+"\n" {
		t.Errorf("remove says %q", out)
	}
	refused("shoal prefetch", "pin", a)
	must(run("unpin", b))(t)
	must(run("remove", list()[0].Layer))(t)
	if all = list(); len(all) != 0 {
		t.Errorf("all is removed, and there is %+v", all)
	}
	// What was removed comes again.
	must(s.Run(ctx, "shoal", "prefetch", "--control", s.supernode.Control, a))(t)
	if all = list(); len(all) != 2 {
		t.Errorf("brought again: %+v", all)
	}
}

// stopped ends a supernode that is to be started again.
func stopped(t *testing.T, s *lab.Supernode) *lab.Supernode {
	t.Helper()
	noError(t, s.Stop())
	return s
}

// TestRevokeOnAll: a node that is revoked at one supernode is out at its siblings as well,
// also at one that was down at that time; and what takes that back is told like it.
func TestRevokeOnAll(t *testing.T) {
	bin(t) // skips without root
	l := newLab(t)
	ctx := t.Context()
	supers := must(l.StartSupernodes(ctx, "super", 2, ""))(t)
	node := must(l.StartNode(ctx, "node", supers[0].Address+","+supers[1].Address, ""))(t)
	id := nodeAddr(t, node).ID.String()
	state := func(s *lab.Supernode, id, want string) {
		t.Helper()
		noError(t, lab.WaitFor(ctx, want, 30*time.Second, func() error {
			out, err := l.Run(ctx, "shoal", "members", "--output", "json", "--control", s.Control)
			var list []struct{ ID, State string }
			if err == nil {
				err = json.Unmarshal([]byte(out), &list)
			}
			got := ""
			for _, m := range list {
				if m.ID == id {
					got = m.State
				}
			}
			if err == nil && got != want {
				err = fmt.Errorf("%s is %q at %s, want %q", id, got, s.Name, want)
			}
			return err
		}))
	}
	members := func(s *lab.Supernode, args ...string) {
		t.Helper()
		must(l.Run(ctx, "shoal", append(append([]string{"members"}, args...), "--control", s.Control)...))(t)
	}
	state(supers[0], id, "member")
	state(supers[1], id, "member")
	members(supers[0], "revoke", id)
	state(supers[1], id, "revoked")
	logged(t, node.Log, "not a member of the supernode", "revoked")

	other := newClient(t).id.String()
	noError(t, supers[1].Stop())
	members(supers[0], "revoke", other)
	members(supers[0], "allow", id)
	supers[1] = must(l.RestartSupernode(ctx, supers[1]))(t)
	state(supers[1], other, "revoked")
	state(supers[1], id, "member")
	members(supers[1], "allow", other)
	state(supers[0], other, "")
	state(supers[0], id, "member")
}
