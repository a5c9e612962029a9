package integration

import (
	"crypto/rand"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"
)

// TestCommands: what operators type, right and wrong.
func TestCommands(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, dir("d/"), file("d/f", bigContent(1))))

	t.Run("config default passes config check", func(t *testing.T) {
		for _, role := range []string{"node", "supernode"} {
			file := s.Path(role + "-default.toml")
			out := must(s.Run(ctx, "shoal", "config", "default", role))(t)
			if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
				t.Fatal(err)
			}
			if out := must(s.Run(ctx, "shoal", "config", "check", role, file))(t); !strings.Contains(out, "ok") {
				t.Errorf("config check says %q", out)
			}
		}
	})
	bad := map[string]struct {
		args []string
		file string
		want string
	}{
		"unknown flag":    {[]string{"node", "--confg", "x"}, "", "unknown flag: --confg"},
		"unknown command": {[]string{"nod"}, "", "unknown command"},
		"no image":        {[]string{"prefetch"}, "", "no image is given"},
		"bad reference":   {[]string{"prefetch", "--control", s.node.Control, "UPPER CASE"}, "", "not an image reference"},
		"no daemon":       {[]string{"status", "--control", "/nowhere/sock"}, "", "no shoal daemon answers"},
		"bad output":      {[]string{"status", "--output", "xml"}, "", "table or json"},
		"no file":         {[]string{"node", "--config", "/nowhere.toml"}, "", "config default"},
		"unknown key":     {[]string{"config", "check", "node", "FILE"}, "version = 1\nrooot = \"/x\"\n", "rooot"},
		"bad duration":    {[]string{"config", "check", "node", "FILE"}, "version = 1\nread_timeout = \"soon\"\n", "read_timeout"},
		"clash":           {[]string{"config", "check", "node", "FILE"}, "version = 1\naddress = \"/a\"\ncontrol_address = \"/a\"\n", "need a socket each"},
		"small quota":     {[]string{"config", "check", "supernode", "FILE"}, "version = 1\n[store]\nquota = \"3MiB\"\n", "store.quota"},
		"future version":  {[]string{"config", "check", "supernode", "FILE"}, "version = 9\n", "version"},
		"bad supernode":   {[]string{"node", "--config", "FILE"}, "version = 1\nroot = \"/tmp/x\"\nsupernodes = [\"10.0.0.1:7700\"]\n", "ID@host:port"},
		"not there":       {[]string{"prefetch", "--control", s.node.Control, s.registry.Addr + "/no/such:image"}, "", "no/such"},
	}
	for name, c := range bad {
		t.Run(name, func(t *testing.T) {
			args := append([]string(nil), c.args...)
			for i, a := range args {
				if a == "FILE" {
					args[i] = s.Path("bad.toml")
					if err := os.WriteFile(args[i], []byte(c.file), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			_, err := s.Run(ctx, "shoal", args...)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("shoal %s: got error %v, want one that says %q", strings.Join(args, " "), err, c.want)
			}
		})
	}
	t.Run("prefetch to the supernode, by way of the node", func(t *testing.T) {
		out := must(s.Run(ctx, "shoal", "prefetch", "--control", s.node.Control, ref))(t)
		if !strings.HasSuffix(strings.TrimSpace(out), "done") {
			t.Errorf("the last line is not done:\n%s", out)
		}
		if s.isLazy(t, ctx, ref) {
			t.Error("the image is on the node, which was not asked for")
		}
	})
	t.Run("prefetch --local", func(t *testing.T) {
		must(s.Run(ctx, "shoal", "prefetch", "--local", "--control", s.node.Control, ref))(t)
		if err := s.node.WaitLocal(ctx, ref, time.Second); err != nil {
			t.Errorf("prefetch has ended, but: %v", err)
		}
	})
	t.Run("status", func(t *testing.T) {
		out := must(s.Run(ctx, "shoal", "status", "--control", s.node.Control))(t)
		if !strings.Contains(out, ref) || !strings.Contains(out, "100%") {
			t.Errorf("status does not show the image as complete:\n%s", out)
		}
		out = must(s.Run(ctx, "shoal", "status", "--control", s.node.Control, "-o", "json"))(t)
		var v struct {
			Images []struct{ Ref string }
		}
		if err := json.Unmarshal([]byte(out), &v); err != nil || len(v.Images) != 1 || v.Images[0].Ref != ref {
			t.Errorf("status as JSON: %v, %+v", err, v)
		}
	})
	t.Run("completion", func(t *testing.T) {
		for _, shell := range []string{"bash", "zsh", "fish"} {
			if out := must(s.Run(ctx, "shoal", "completion", shell))(t); !strings.Contains(out, "shoal") {
				t.Errorf("no completion for %s", shell)
			}
		}
	})
}

// TestPrefetchProgress: through a node, too, one sees how far the supernode is.
func TestPrefetchProgress(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Address, ""))(t)
	slow := must(s.NewLink(s.registry.Addr, 4<<20, 0))(t)
	content := make([]byte, 10<<20)
	_, err := rand.Read(content)
	noError(t, err)
	s.push(t, "big", layer(t, file("f", string(content))))
	out := must(s.Run(ctx, "shoal", "prefetch", "--control", s.node.Control, slow.Addr+"/big:v1"))(t)
	if !strings.Contains(out, " fetching (10") || !strings.HasSuffix(strings.TrimSpace(out), "done") {
		t.Errorf("nothing was said while the layer came:\n%s", out)
	}
}
