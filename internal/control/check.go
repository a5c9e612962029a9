package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

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

func serveCheck(d Daemon, w http.ResponseWriter, r *http.Request) {
	var req CheckRequest
	if err := json.NewDecoder(io.LimitReader(r.Body, 64<<10)).Decode(&req); err != nil {
		http.Error(w, "request: "+err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	send := func(e checkEvent) {
		_ = json.NewEncoder(w).Encode(e) // r.Context ends when the client goes away
		_ = http.NewResponseController(w).Flush()
	}
	report, err := d.Check(r.Context(), req, func(what string) { send(checkEvent{What: what}) })
	if err != nil {
		send(checkEvent{Error: err.Error()})
		return
	}
	send(checkEvent{Report: report})
}

// maxReportLine bounds one line of the answer, in bytes.
const maxReportLine = 64 << 20

// Check has the daemon check what it keeps, and reports what it looks at as it
// goes.
func (c Client) Check(ctx context.Context, req CheckRequest, event func(what string)) (*CheckReport, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	resp, err := c.do(ctx, http.MethodPost, "/v1/check", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxReportLine)
	for lines.Scan() {
		var e checkEvent
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("daemon's answer: %w", err)
		}
		switch {
		case e.Error != "":
			return nil, errors.New(e.Error)
		case e.Report != nil:
			return e.Report, nil
		default:
			event(e.What)
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return nil, fmt.Errorf("the daemon ended before the check did (%w): see its log", errors.Join(io.ErrUnexpectedEOF, lines.Err()))
}
