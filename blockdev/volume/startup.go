package volume

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/internal/tasks"
)

const (
	// startupRequests are under way at a time for one image. One that comes through
	// other nodes takes some links' time to come, and until then the link here must
	// have something to do; no server is asked for more (exchange.Limits).
	startupRequests = 8
	// startupWindow is how many chunks, by rank, are sorted into one request for
	// each diff: about 1 MiB.
	startupWindow = 16
	// maxStartup bounds the chunks of one image that are fetched by its profiles.
	maxStartup = 2 * blockdev.MaxProfile

	// A recording ends when nothing new has been read for recordUntilQuiet, or after
	// recordAtMost.
	recordUntilQuiet = 5 * time.Second
	recordAtMost     = time.Minute
	// reportTimeout bounds handing over what was recorded, also when the node
	// stops.
	reportTimeout = 3 * time.Second
)

// FetchStartup begins to fetch what containers of an image are known to read in
// their first seconds, in that order, and returns at once. Profiles are not
// trusted: diffs and chunks that are not there are passed over, and the number
// of chunks is bounded. What cannot be fetched is left to reads and prefetch.
func (m *Manager) FetchStartup(profiles []blockdev.DiffProfile) {
	m.startups.fetch(startupLine(profiles, m.volume))
}

// startups are the fetches and the recordings of what containers read at their start.
type startups struct {
	tasks *tasks.Group
	log   *slog.Logger
	late  *late // takes what was recorded
}

func newStartups(log *slog.Logger, late *late) *startups {
	return &startups{tasks.New(), log, late}
}

// fetch begins to make these requests, in this order.
func (s *startups) fetch(line []startupRequest) {
	if len(line) == 0 {
		return
	}
	s.tasks.Run(func() {
		var workers sync.WaitGroup
		work := make(chan startupRequest)
		for range startupRequests {
			workers.Go(func() {
				for r := range work {
					err := r.v.diff.FetchStartup(s.tasks.Context(), r.chunks)
					if err != nil && s.tasks.Context().Err() == nil && !errors.Is(err, cache.ErrRemoved) {
						s.log.Info("cannot fetch startup chunks; they are fetched when a container reads them", "error", err)
					}
				}
			})
		}
		defer workers.Wait()
		defer close(work)
		for _, r := range line {
			select {
			case work <- r:
			case <-s.tasks.Context().Done():
				return
			}
		}
	})
}

// startupRequest is some chunks of one diff.
type startupRequest struct {
	v      *volume
	chunks []uint32
}

// startupLine makes requests of profiles: windows of the image's chunks by rank,
// each sorted by diff.
func startupLine(profiles []blockdev.DiffProfile, find func(blockdev.Digest) (*volume, error)) []startupRequest {
	type row struct {
		v *volume
		blockdev.Touch
	}
	var rows []row
	for _, p := range profiles {
		v, err := find(p.Diff)
		if err != nil || v.diff.Complete() {
			continue
		}
		for _, t := range p.Profile[:min(len(p.Profile), blockdev.MaxProfile)] {
			rows = append(rows, row{v, t})
		}
	}
	slices.SortStableFunc(rows, func(a, b row) int { return cmp.Compare(a.Rank, b.Rank) })
	rows = rows[:min(len(rows), maxStartup)]
	var line []startupRequest
	for window := range slices.Chunk(rows, startupWindow) {
		at := make(map[*volume]int)
		for _, r := range window {
			i, ok := at[r.v]
			if !ok {
				i = len(line)
				at[r.v] = i
				line = append(line, startupRequest{v: r.v})
			}
			line[i].chunks = append(line[i].chunks, r.Chunk)
		}
	}
	return line
}

// record notes what the container that is about to start reads of those diffs
// that nothing has read since they were mounted, and reports it: a diff whose
// pages EROFS has already would only show what others have not read before.
func (s *startups) record(vols []*volume) {
	if up := s.late.now(); up.Source != nil && up.Profiles == nil {
		return
	}
	var diffs []*cache.Diff
	var recorded []*volume
	for _, v := range vols {
		if d, ok := v.diff.(*cache.Diff); ok && v.firstStart() {
			diffs, recorded = append(diffs, d), append(recorded, v)
		}
	}
	if len(diffs) == 0 {
		return
	}
	// From here on, not from whenever the task is let run: the first reads count.
	r := cache.Record(diffs...)
	s.tasks.Run(func() {
		began := time.Now()
		tick := time.NewTicker(recordUntilQuiet / 5)
		defer tick.Stop()
		for done := false; !done; {
			select {
			case now := <-tick.C:
				last := r.Last()
				done = now.Sub(began) >= recordAtMost || (!last.IsZero() && now.Sub(last) >= recordUntilQuiet)
			case <-s.tasks.Context().Done():
				done = true
			}
		}
		profiles := r.Stop()
		if len(profiles) == 0 {
			for _, v := range recorded {
				v.setStarted(false) // it was no start, or one that read nothing
			}
			return
		}
		// Also when the node stops: what was learned is for others.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.tasks.Context()), reportTimeout)
		defer cancel()
		if err := s.late.report(ctx, profiles); err != nil {
			s.log.Info("cannot report which chunks a container read at its start; the startup profile does not learn from this start", "error", err)
		}
	})
}
