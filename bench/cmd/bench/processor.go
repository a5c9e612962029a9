package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// processorTime is what /proc/stat says of all processors since the machine came
// up, in ticks.
type processorTime struct{ busy, all float64 }

func readProcessorTime() (t processorTime, err error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return t, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return t, fmt.Errorf("/proc/stat begins with %q", line)
	}
	// user, nice, system, idle, iowait, irq, softirq, steal
	for i, f := range fields[1:9] {
		v, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return t, err
		}
		t.all += v
		if i != 3 && i != 4 {
			t.busy += v
		}
	}
	return t, nil
}

// since is the share of the processors that has been busy since before.
func (t processorTime) since(before processorTime) float64 {
	if t.all == before.all {
		return 0
	}
	return (t.busy - before.busy) / (t.all - before.all)
}
