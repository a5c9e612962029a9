package control

import (
	"context"
	"errors"

	"github.com/shoalfs/shoal/blockdev"
)

// CheckRequest asks for a check.
type CheckRequest struct {
	Repair bool `json:"repair"`
}

// CheckReport is what `shoal check` shows. Sizes are bytes.
type CheckReport struct {
	// Role is node or supernode, Root the directory if no daemon was asked.
	Role string `json:"role"`
	Root string `json:"root,omitempty"`
	// Result is clean, damaged or repaired.
	Result string `json:"result"`
	// Layers that were looked at: Complete ones have all bytes, Proven ones were
	// shown to be what the image config says.
	Layers   int `json:"layers"`
	Complete int `json:"complete"`
	Proven   int `json:"proven"`
	// Chunks and Bytes were read and compared with their digests.
	Chunks    int   `json:"chunks"`
	Bytes     int64 `json:"bytes"`
	Mounts    int   `json:"mounts"`
	Databases int   `json:"databases"`
	Snapshots int   `json:"snapshots"`
	// Findings are all that is wrong.
	Findings []blockdev.Finding `json:"findings"`
}

// Results of a check.
const (
	Clean    = "clean"
	Damaged  = "damaged"
	Repaired = "repaired"
)

// Judge sets Result: repaired only if all of it is.
func (r *CheckReport) Judge(repair bool) {
	r.Result = Clean
	for _, f := range r.Findings {
		if f.Repaired == "" || !repair {
			r.Result = Damaged
			return
		}
		r.Result = Repaired
	}
}

// checkEvent is one line of the answer; the last one has Report or Error.
type checkEvent struct {
	What   string       `json:"what,omitempty"`
	Report *CheckReport `json:"report,omitempty"`
	Error  string       `json:"error,omitempty"`
}

// Check has the daemon check what it keeps, and reports what it looks at as it
// goes.
func (c Client) Check(ctx context.Context, req CheckRequest, event func(what string)) (report *CheckReport, err error) {
	var failed error
	err = events(ctx, c, "/v1/check", req, "the check did", func(e checkEvent) bool {
		switch {
		case e.Error != "":
			failed = errors.New(e.Error)
		case e.Report != nil:
			report = e.Report
		default:
			event(e.What)
		}
		return failed != nil || report != nil
	})
	return report, errors.Join(err, failed)
}
