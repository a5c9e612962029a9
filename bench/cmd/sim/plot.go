package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
)

// curve is one line of a plot.
type curve struct {
	name   string
	result result
}

var colours = []string{"#1b6ca8", "#d1495b", "#2e933c", "#8f5fbf", "#e08e0b", "#555555"}

// plots draws when nodes had the whole image, and how evenly they uploaded.
func plots(dir string, all []curve) error {
	pick := func(names ...string) (some []curve) {
		for _, n := range names {
			for _, c := range all {
				if strings.Contains(c.name, n) && len(c.result.times) > 0 {
					some = append(some, c)
					break
				}
			}
		}
		return some
	}
	times := func(r result) []float64 { return r.times }
	upload := func(r result) []float64 { return r.upload }
	return errors.Join(
		draw(dir, "sim-times.svg", "Nodes that have the whole image", "time, over image size / link rate", times,
			pick("1,000 nodes at once", "10,000 nodes at once", "as slow as a node", "Kraken", "FaaSNet", "200 nodes, all from")),
		draw(dir, "sim-faults.svg", "Nodes that have the whole image, with faults", "time, over image size / link rate", times,
			pick("1,000 nodes at once", "supernode killed", "half of them killed", "vanishes", "nine in ten", "within ten")),
		draw(dir, "sim-upload.svg", "What each node uploaded", "bytes, over image size", upload,
			pick("1,000 nodes at once", "10,000 nodes at once", "Kraken", "FaaSNet")),
	)
}

// Measures of a plot, in pixels.
const (
	plotWidth, plotHeight = 720, 420
	left, right           = 60, 20
	top, bottom           = 40, 50
)

// draw writes one plot: for each curve the share of nodes at or below each value.
func draw(dir, file, title, axis string, values func(result) []float64, curves []curve) error {
	highest := 0.0
	for _, c := range curves {
		highest = max(highest, quantile(values(c.result), 1))
	}
	// Far-off curves are cut, so that those that matter can be told apart.
	highest = min(max(highest*1.05, 1), 6)
	x := func(v float64) float64 { return left + min(v, highest)/highest*(plotWidth-left-right) }
	y := func(share float64) float64 { return plotHeight - bottom - share*(plotHeight-top-bottom) }
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", plotWidth, plotHeight)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/><text x="%d" y="22" font-size="15">%s</text>`+"\n", plotWidth, plotHeight, left, title)
	for s := 0.0; s <= 1; s += .25 {
		fmt.Fprintf(&b, `<path d="M%d %.1fH%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.0f %%</text>`+"\n", left, y(s), plotWidth-right, left-8, y(s)+4, 100*s)
	}
	step := math.Pow(10, math.Floor(math.Log10(highest/2)))
	for _, k := range []float64{5, 2} {
		if highest/(step*k) >= 4 {
			step *= k
			break
		}
	}
	for v := 0.0; v <= highest; v += step {
		fmt.Fprintf(&b, `<path d="M%.1f %dV%d" stroke="#eee"/><text x="%.1f" y="%d" text-anchor="middle">%.3g</text>`+"\n", x(v), top, plotHeight-bottom, x(v), plotHeight-bottom+18, v)
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">%s</text>`+"\n", (left+plotWidth-right)/2, plotHeight-10, axis)
	for i, c := range curves {
		vs := values(c.result)
		var path strings.Builder
		fmt.Fprintf(&path, "M%.1f %.1f", x(vs[0]), y(0))
		for q := 1; q <= 200; q++ {
			share := float64(q) / 200
			v := vs[max(int(math.Ceil(share*float64(len(vs))))-1, 0)]
			if v > highest {
				break
			}
			fmt.Fprintf(&path, "L%.1f %.1f", x(v), y(share))
		}
		colour := colours[i%len(colours)]
		fmt.Fprintf(&b, `<path d="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", path.String(), colour)
		fmt.Fprintf(&b, `<text x="%d" y="%d" fill="%s" text-anchor="end">%s</text>`+"\n", plotWidth-right-4, plotHeight-bottom-10-16*(len(curves)-1-i), colour, c.name)
	}
	b.WriteString("</svg>\n")
	return os.WriteFile(filepath.Join(dir, file), []byte(b.String()), 0o644)
}
