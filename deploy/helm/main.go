// Command helm writes the package of the chart, as `helm package` does, with the
// versions of a release: `helm install` takes it without a checkout. The tests of the
// chart are here, too: Helm's own library lints and renders it, and what comes out is
// decoded as the Kubernetes API does, without unknown fields.
package main

import (
	"flag"
	"fmt"
	"os"
	"time"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/chart/v2/util"
)

func main() {
	var p pack
	seconds := flag.Int64("time", 0, "time of all files in the package, in seconds since 1970")
	flag.StringVar(&p.Chart, "chart", "shoal", "folder of the chart")
	flag.StringVar(&p.Version, "version", "", "version of the chart, such as 1.2.3")
	flag.StringVar(&p.AppVersion, "app-version", "", "tag of the image, such as v1.2.3")
	flag.StringVar(&p.License, "license", "../../LICENSE", "license file that the package has")
	flag.StringVar(&p.To, "to", ".", "folder to write to")
	flag.Parse()
	p.Time = time.Unix(*seconds, 0)
	if _, err := p.write(); err != nil {
		fmt.Fprintln(os.Stderr, "helm:", err)
		os.Exit(1)
	}
}

// pack says what the package of a chart has.
type pack struct {
	Chart, License, To  string
	Version, AppVersion string
	Time                time.Time
}

// write writes NAME-VERSION.tgz and returns its path. The same input gives the same
// bytes.
func (p pack) write() (string, error) {
	c, err := loader.Load(p.Chart)
	if err != nil {
		return "", fmt.Errorf("load the chart %s: %w", p.Chart, err)
	}
	license, err := os.ReadFile(p.License)
	if err != nil {
		return "", err
	}
	c.Metadata.Version, c.Metadata.AppVersion = p.Version, p.AppVersion
	c.Files = append(c.Files, &common.File{Name: "LICENSE", Data: license})
	c.StampModTimes(p.Time)
	name, err := util.Save(c, p.To)
	if err != nil {
		return "", fmt.Errorf("write the chart's package to %s: %w", p.To, err)
	}
	// Save does not look at the errors of the last writes.
	if _, err := loader.Load(name); err != nil {
		return "", fmt.Errorf("the chart's package was written and cannot be read: %w", err)
	}
	return name, nil
}
