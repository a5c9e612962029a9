package main

import (
	"os/exec"
	"testing"
)

// TestPackageVersions: dpkg itself sorts the versions as they follow each other.
func TestPackageVersions(t *testing.T) {
	order := []string{"6ac8a40-dirty", "v0.9.0", "v1.0.0-rc.1", "v1.0.0-rc.2", "v1.0.0", "v1.0.0-3-g6ac8a40", "v1.0.0-12-g6ac8a40-dirty", "v1.0.1-rc.1", "v1.0.1", "v1.10.0"}
	for i := range order[1:] {
		a, b := packageVersion(order[i]), packageVersion(order[i+1])
		if out, err := exec.Command("dpkg", "--compare-versions", a, "lt", b).CombinedOutput(); err != nil {
			t.Errorf("%s is not before %s: %v %s", a, b, err, out)
		}
	}
	if got := fileVersion("v1.0.0-rc.1"); got != "1.0.0-rc.1" {
		t.Errorf("file version %q", got)
	}
}
