package deploy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestUnits: each unit file starts the program where those that install it look for that, and
// after the disk that has the daemon's root; the packages restart and stop each unit.
func TestUnits(t *testing.T) {
	if read(t, NodeUnitName) != NodeUnit {
		t.Errorf("NodeUnit is not %s", NodeUnitName)
	}
	units, err := filepath.Glob("*.service")
	if err != nil || len(units) < 2 {
		t.Fatalf("unit files: %v, %v", units, err)
	}
	for _, unit := range units {
		root := map[string]string{NodeUnitName: NodeRoot, "shoal-supernode.service": "/var/lib/shoal-supernode"}[unit]
		if n := strings.Count(read(t, unit), "\nRequiresMountsFor="+root+"\n"); n != 1 {
			t.Errorf("%s requires the disk of %q %d times", unit, root, n)
		}
		if n := strings.Count(read(t, unit), "\nExecStart="+ProgramPath+" "); n != 1 {
			t.Errorf("%s starts %s %d times", unit, ProgramPath, n)
		}
		for _, script := range []string{"postinstall.sh", "preremove.sh"} {
			if !strings.Contains(read(t, filepath.Join("release", "scripts", script)), unit) {
				t.Errorf("%s leaves %s out", script, unit)
			}
		}
	}
}
