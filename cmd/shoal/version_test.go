package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestVersion: the command and the flag print the same line.
func TestVersion(t *testing.T) {
	for _, arg := range []string{"version", "--version"} {
		var out bytes.Buffer
		cmd := newCommand()
		cmd.SetOut(&out)
		cmd.SetArgs([]string{arg})
		if err := cmd.Execute(); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); got != versionLine() || !strings.HasPrefix(got, "shoal "+version+" go") || strings.Count(got, "\n") != 1 {
			t.Errorf("shoal %s prints %q, want %q", arg, got, versionLine())
		}
	}
}
