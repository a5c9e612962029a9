package main

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	v2 "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

// TestPackage: Helm reads the package, and renders from it what it renders from the
// folder with the same versions. A copy of the folder gives the same bytes.
func TestPackage(t *testing.T) {
	folder := filepath.Join(t.TempDir(), chart)
	if err := os.CopyFS(folder, os.DirFS(chart)); err != nil {
		t.Fatal(err)
	}
	var packages [2][]byte
	var name string
	for i, from := range []string{chart, folder} {
		p := pack{
			Chart: from, License: "../../LICENSE", To: filepath.Join(t.TempDir(), "release"),
			Version: "1.2.3-rc.1", AppVersion: "v1.2.3-rc.1", Time: time.Unix(1_700_000_000, 0),
		}
		var err error
		if name, err = p.write(); err != nil {
			t.Fatal(err)
		}
		if packages[i], err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(packages[0], packages[1]) {
		t.Error("two packages of the same files differ")
	}
	if filepath.Base(name) != "shoal-1.2.3-rc.1.tgz" {
		t.Errorf("the package is called %s", name)
	}
	packed, err := loader.Load(name)
	if err != nil {
		t.Fatal(err)
	}
	if last := packed.Files[len(packed.Files)-1]; last.Name != "LICENSE" || len(last.Data) == 0 {
		t.Errorf("the last file is %s, of %d bytes", last.Name, len(last.Data))
	}
	plain, err := loader.Load(chart)
	if err != nil {
		t.Fatal(err)
	}
	plain.Metadata.Version, plain.Metadata.AppVersion = "1.2.3-rc.1", "v1.2.3-rc.1"
	for name, v := range cases {
		got, want := rendered(t, packed, v), rendered(t, plain, v)
		if len(want) == 0 || !maps.Equal(got, want) {
			t.Errorf("%s: the package renders %v, want %v", name, got, want)
		}
	}
	if node := rendered(t, packed, nil)["shoal/templates/node.yaml"]; !bytes.Contains([]byte(node), []byte(`image: "ghcr.io/shoalfs/shoal:v1.2.3-rc.1"`)) {
		t.Errorf("the image is not the release's:\n%s", node)
	}
}

// TestNoPackage: what Helm would not install is refused.
func TestNoPackage(t *testing.T) {
	p := pack{Chart: chart, License: "../../LICENSE", To: t.TempDir(), Version: "0.0.0-0123456", AppVersion: "0123456"}
	if _, err := p.write(); err == nil {
		t.Error("a version that is not semantic is accepted")
	}
}

func rendered(t *testing.T, c *v2.Chart, v values) map[string]string {
	t.Helper()
	all, err := util.ToRenderValues(c, v, common.ReleaseOptions{Name: "shoal", Namespace: "shoal-system", IsInstall: true}, common.DefaultCapabilities)
	if err != nil {
		t.Fatal(err)
	}
	files, err := engine.Render(c, all)
	if err != nil {
		t.Fatal(err)
	}
	return files
}
