package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/shoalfs/shoal/integration/report"
)

// processorTime is what /proc/stat says of all processors since the machine came
// up, in ticks. stolen is a part of busy.
type processorTime struct{ busy, all, stolen float64 }

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
		t.stolen = v // the last one
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

// noteStolen adds a row on the machine that a target ran on, whose neighbours come
// and go: comparing runs of two days without it is comparing neighbours.
func (t processorTime) noteStolen(r *report.Report) error {
	now, err := readProcessorTime()
	if err != nil {
		return err
	}
	var share float64
	if now.busy > t.busy {
		share = 100 * (now.stolen - t.stolen) / (now.busy - t.busy)
	}
	r.Note("processor time wanted here that other virtual machines got (more than 5 makes all times longer)", "%", share)
	return nil
}
