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
	for version, want := range map[string]string{"v1.0.0-rc.1": "1.0.0-rc.1", "v1.0.0-3-g6ac8a40": "1.0.0-3-g6ac8a40", "0123456-dirty": "0.0.0-g0123456-dirty"} {
		if got := fileVersion(version); got != want {
			t.Errorf("%s: file version %q, want %q", version, got, want)
		}
	}
}
