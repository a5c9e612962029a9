package daemon

import (
	"errors"
	"log/slog"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// memoryShare is the part of a cgroup's limit that Go's memory may take. The rest
// is for what Go does not count: pages of files that are being written, the stacks
// of threads, the kernel's buffers.
const memoryShare = 0.7

// LimitMemory has Go collect garbage in time to stay within the memory limit of the
// cgroup that the daemon runs in, if there is one. GOMEMLIMIT in the environment
// goes before it.
func LimitMemory(log *slog.Logger) {
	limit, err := memlimit.SetGoMemLimitWithOpts(memlimit.WithRatio(memoryShare), memlimit.WithProvider(memlimit.FromCgroup))
	switch {
	case errors.Is(err, memlimit.ErrNoLimit), errors.Is(err, memlimit.ErrNoCgroup), errors.Is(err, memlimit.ErrCgroupsNotSupported):
	case err != nil:
		log.Warn("cannot read the memory limit of the cgroup; if the cgroup has a limit, set GOMEMLIMIT below it", "error", err)
	case limit > 0:
		log.Info("memory is limited by the cgroup", "goBytes", limit)
	}
}
