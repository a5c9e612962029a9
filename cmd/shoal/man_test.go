package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestManPages: each command that help shows has a page, and two runs write the same.
func TestManPages(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1800000000")
	first, second := t.TempDir(), t.TempDir()
	for _, dir := range []string{first, second} {
		if _, err := shoal(t, "man", dir); err != nil {
			t.Fatal(err)
		}
	}
	for _, page := range []string{"shoal.1", "shoal-node.1", "shoal-install-containerd.1", "shoal-config-check.1"} {
		a, err := os.ReadFile(filepath.Join(first, page))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(second, page))
		if err != nil {
			t.Fatal(err)
		}
		if string(a) != string(b) {
			t.Errorf("%s: two runs differ", page)
		}
		if !strings.Contains(string(a), "Jan 2027") {
			t.Errorf("%s: it does not have the date of SOURCE_DATE_EPOCH", page)
		}
	}
	if _, err := os.Stat(filepath.Join(first, "shoal-man.1")); !os.IsNotExist(err) {
		t.Errorf("the hidden command has a page: %v", err)
	}
}
