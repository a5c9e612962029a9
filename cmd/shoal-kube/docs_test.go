package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/watch"
)

const docs = "../../docs/"

var update = flag.Bool("update", false, "write the tables in docs/ again")

// section returns what a page has between two marks, and what is before and after that.
func section(t *testing.T, page, name string) (before, between, after string) {
	t.Helper()
	b, err := os.ReadFile(docs + page)
	if err != nil {
		t.Fatal(err)
	}
	from, to := "<!-- "+name+" -->\n", "<!-- end of "+name+" -->"
	i, j := strings.Index(string(b), from), strings.Index(string(b), to)
	if i < 0 || j < i {
		t.Fatalf("%s has no %q with its end", page, strings.TrimSpace(from))
	}
	i += len(from)
	return string(b[:i]), string(b[i:j]), string(b[j:])
}

// TestDocsTables: tables that the program makes are what it says.
func TestDocsTables(t *testing.T) {
	for _, table := range []struct{ page, name, want string }{
		{"kubernetes.md", "rights of shoal-kube watch", rulesTable()},
		{"commands.md", "flags of shoal-kube watch", flagsTable()},
	} {
		before, got, after := section(t, table.page, table.name)
		switch {
		case got == table.want:
		case *update:
			if err := os.WriteFile(docs+table.page, []byte(before+table.want+after), 0o644); err != nil {
				t.Fatal(err)
			}
		default:
			t.Errorf("%s, %s: not as it is (go test . -run TestDocsTables -update writes it):\n%s\nwant:\n%s", table.page, table.name, got, table.want)
		}
	}
}

func rulesTable() string {
	table := "| API group | resource | verbs | for |\n|---|---|---|---|\n"
	for _, r := range watch.Rules() {
		group := strings.Join(r.APIGroups, ", ")
		if group == "" {
			group = "core"
		}
		table += fmt.Sprintf("| %s | `%s` | %s | %s |\n", group, strings.Join(r.Resources, ", "), strings.Join(r.Verbs, ", "), r.For)
	}
	return table
}

func flagsTable() string {
	table := "| flag | default | |\n|---|---|---|\n"
	newWatchCommand().Flags().VisitAll(func(f *pflag.Flag) {
		value := f.DefValue
		if f.Name == "node" {
			value = "$NODE_NAME"
		}
		if value != "" {
			value = "`" + value + "`"
		}
		table += fmt.Sprintf("| `--%s` | %s | %s |\n", f.Name, value, f.Usage)
	})
	return table
}

// TestDocsReasons: the pages say of each reason what it means, and of no other.
func TestDocsReasons(t *testing.T) {
	for name, want := range map[string][]string{"conditions": watch.Reasons, "events": watch.Events} {
		_, table, _ := section(t, "troubleshooting.md", name)
		var got []string
		for _, row := range strings.Split(table, "\n")[2:] {
			// The reason is the first or second column.
			if m := regexp.MustCompile("^\\| (?:[A-Z][a-z]+ \\| )?`([A-Za-z]+)`").FindStringSubmatch(row); m != nil {
				got = append(got, m[1])
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("the table of %s has %q, and the program %q", name, got, want)
		}
	}
}

// TestCommands: what is missing or wrong is said before Kubernetes is asked for anything.
func TestCommands(t *testing.T) {
	t.Setenv("NODE_NAME", "")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"watch"}, "NODE_NAME"},
		{[]string{"watch", "--node", "n"}, "--kubeconfig"},
		{[]string{"watch", "--node", "n", "--kubeconfig", "/not/there"}, "/not/there"},
		{[]string{"watch", "more"}, "unknown command"},
		{[]string{"unknown"}, "unknown command"},
	} {
		cmd := newCommand()
		cmd.SetArgs(c.args)
		cmd.SetOut(&bytes.Buffer{})
		if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want an error with %q", c.args, err, c.want)
		}
	}
}
