package main

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/metrics"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/mirror"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/roster"
	"github.com/shoalfs/shoal/p2p/swarm"
	"github.com/shoalfs/shoal/supernode"
)

const docs = "../../docs/"

var update = flag.Bool("update", false, "write the tables in docs/ anew")

// TestDocsTables: the tables in the operators' pages are what the program says.
func TestDocsTables(t *testing.T) {
	for _, table := range []struct{ page, name, want string }{
		{"configuration.md", "keys of node.toml", keyTable(t, "node")},
		{"configuration.md", "keys of supernode.toml", keyTable(t, "supernode")},
		{"metrics.md", "metrics of a node", metricTable(t, nodeMetrics)},
		{"metrics.md", "metrics of a supernode", metricTable(t, supernodeMetrics)},
	} {
		from, to := "<!-- "+table.name+" -->\n", "<!-- end of "+table.name+" -->\n"
		before, rest, ok := strings.Cut(readDoc(t, table.page), from)
		got, after, ok2 := strings.Cut(rest, to)
		if !ok || !ok2 {
			t.Errorf("%s has no %q with its end", table.page, strings.TrimSpace(from))
			continue
		}
		switch {
		case got == table.want:
		case *update:
			if err := os.WriteFile(docs+table.page, []byte(before+from+table.want+to+after), 0o644); err != nil {
				t.Fatal(err)
			}
		default:
			t.Errorf("%s, %s: not as it is (go test ./cmd/shoal -run TestDocsTables -update writes it):\n%s\nwant:\n%s",
				table.page, table.name, got, table.want)
		}
	}
}

func readDoc(t *testing.T, page string) string {
	t.Helper()
	b, err := os.ReadFile(docs + page)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// keyTable makes a table of `shoal config default role`.
func keyTable(t *testing.T, role string) string {
	t.Helper()
	out, err := shoal(t, "config", "default", role)
	if err != nil {
		t.Fatal(err)
	}
	table := "| key | default | |\n|---|---|---|\n"
	section, comment := "", ""
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		key, value, isKey := strings.Cut(line, " = ")
		switch {
		case strings.HasPrefix(line, "# "):
			comment = line[2:]
			continue
		case strings.HasPrefix(line, "["):
			section = strings.Trim(line, "[]") + "."
		case isKey:
			if key == "version" {
				comment = fmt.Sprintf("of the file's form; this one is %d", config.Version)
			}
			if comment == "" {
				t.Errorf("%s%s has no comment", section, key)
			}
			table += fmt.Sprintf("| `%s%s` | `%s` | %s |\n", section, key, strings.ReplaceAll(value, "'", `"`), comment)
		}
		comment = ""
	}
	return table
}

// names collects what is registered, whether it has a value or not, in the order
// of registration: help texts refer to the one before.
type names struct{ rows []string }

var desc = regexp.MustCompile(`^Desc\{fqName: "([^"]+)", help: "([^"]*)",(?: unit: "[^"]*",)? constLabels: \{([^}]*)\}, variableLabels: \{([^}]*)\}\}$`)

func (n *names) Register(c prometheus.Collector) error {
	described := make(chan *prometheus.Desc)
	go func() {
		c.Describe(described)
		close(described)
	}()
	var all []*prometheus.Desc
	for d := range described {
		all = append(all, d)
	}
	for _, d := range all {
		m := desc.FindStringSubmatch(d.String())
		if m == nil {
			return fmt.Errorf("%s: not as this test reads it", d)
		}
		if !strings.HasPrefix(m[1], "shoal_") {
			continue // Go's and the process's own
		}
		var labels []string
		for _, l := range strings.Split(m[3]+","+m[4], ",") {
			if l, _, _ = strings.Cut(l, "="); l != "" {
				labels = append(labels, "`"+l+"`")
			}
		}
		row := fmt.Sprintf("| `%s` | %s | %s |\n", m[1], strings.Join(labels, ", "), m[2])
		if !slices.Contains(n.rows, row) {
			n.rows = append(n.rows, row)
		}
	}
	return nil
}

func (n *names) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		if err := n.Register(c); err != nil {
			panic(err)
		}
	}
}

func (n *names) Unregister(prometheus.Collector) bool { return true }

func metricTable(t *testing.T, register func(*testing.T, prometheus.Registerer)) string {
	t.Helper()
	n := &names{}
	register(t, n)
	return "| metric | labels | |\n|---|---|---|\n" + strings.Join(n.rows, "")
}

// nodeMetrics registers what node.Open does for a node with a supernode elsewhere.
func nodeMetrics(t *testing.T, r prometheus.Registerer) {
	r.MustRegister(daemon.NewMetrics("v", "node"))
	if _, err := daemon.NewPorts(slog.New(slog.DiscardHandler), r); err != nil {
		t.Fatal(err)
	}
	info, err := host.ParseAddr("12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN@10.0.0.5:7700")
	if err != nil {
		t.Fatal(err)
	}
	n, err := members.New(members.Config{
		Supernodes: []peer.AddrInfo{info}, Token: func() (string, error) { return "", nil }, Registerer: r,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	key, err := host.LoadIdentity(t.TempDir() + "/identity")
	if err != nil {
		t.Fatal(err)
	}
	h, err := host.New(host.Config{Key: key})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	s, err := swarm.New(swarm.Config{Host: h, Groups: n, Supernode: &supernode.Supernode{}, Registerer: r})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	server, err := exchange.NewServer(h, exchange.ServerConfig{Provider: s.Provider(nil), Registerer: r})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := metrics.New().Register(r, nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := mirror.New(mirror.Config{Registerer: r}); err != nil {
		t.Fatal(err)
	}
}

// supernodeMetrics registers what super.Open does.
func supernodeMetrics(t *testing.T, r prometheus.Registerer) {
	r.MustRegister(daemon.NewMetrics("v", "supernode"))
	if _, err := daemon.NewPorts(slog.New(slog.DiscardHandler), r); err != nil {
		t.Fatal(err)
	}
	s, err := supernode.New(supernode.Config{Dir: t.TempDir(), Registerer: r})
	if err != nil {
		t.Fatal(err)
	}
	key, err := host.LoadIdentity(t.TempDir() + "/identity")
	if err != nil {
		t.Fatal(err)
	}
	h, err := host.New(host.Config{Key: key, Listen: []string{"127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	list, err := roster.New(roster.Config{Dir: t.TempDir(), Key: key, Registerer: r})
	if err != nil {
		t.Fatal(err)
	}
	server, err := exchange.NewServer(h, exchange.ServerConfig{Chunks: s, Images: s, Registerer: r})
	if err != nil {
		t.Fatal(err)
	}
	for _, closer := range []func() error{server.Close, list.Close, h.Close, s.Close} {
		if err := closer(); err != nil {
			t.Error(err)
		}
	}
}

// TestDocsExamples: config files that the pages show are right.
func TestDocsExamples(t *testing.T) {
	var shown [][]string
	for _, p := range docPages(t) {
		shown = append(shown, regexp.MustCompile("(?s)```toml (node|supernode)\n(.*?)```").FindAllStringSubmatch(readDoc(t, p), -1)...)
	}
	if len(shown) < 3 {
		t.Errorf("%d examples found", len(shown))
	}
	for _, m := range shown {
		path := t.TempDir() + "/shown.toml"
		if err := os.WriteFile(path, []byte(m[2]), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := shoal(t, "config", "check", m[1], path); err != nil || !strings.HasSuffix(out, "ok\n") {
			t.Errorf("%v, %s\n%s", err, out, m[2])
		}
	}
}
