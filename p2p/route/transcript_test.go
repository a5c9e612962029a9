package route

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

var update = flag.Bool("update", false, "write the transcripts anew, to be read before they are committed")

// script plays the commands of a transcript. Each line is a command, and " => "
// what came of it if that is anything:
//
//	cells 6 | 4 4      zones (|) of cells of so many members, named z0-c0-n0 and so on
//	self z0-c0-n3      which of them decides; hide NAME... are not in its view, full NAME... have everything
//	at 1.5s            the time
//	ask 7 demand 2     whom to ask for chunk 7 (or prefetch), for a request with two hops
//	again              the same search: whom next
//	dead, busy, ...    what became of the last answer; ok 3ms 65536: after so long, so many bytes
//	patience demand    how long to wait
//	hedge 65536        whether so many bytes may be asked for twice
//	outs               who of the members is left out
type script struct {
	t      testing.TB
	c      *cluster
	self   Member
	hidden map[string]bool
	book   *Book
	group  *Group
	now    time.Duration
	ask    Ask
	last   Target
}

var outcomes = map[string]Outcome{"ok": OK, "busy": Busy, "missing": Missing, "slow": Slow, "dead": Dead, "corrupt": Corrupt}

func (s *script) line(f []string) string {
	switch f[0] {
	case "cells":
		var zones [][]int
		for zone := range strings.SplitSeq(strings.Join(f[1:], " "), "|") {
			var sizes []int
			for n := range strings.FieldsSeq(zone) {
				sizes = append(sizes, s.int(n))
			}
			zones = append(zones, sizes)
		}
		s.c, s.book, s.hidden = newCluster(zones...), NewBook(BookOptions{}), map[string]bool{}
	case "self":
		for _, m := range s.c.members {
			if m.ID == f[1] {
				s.self = m
			}
		}
		s.view()
	case "hide":
		for _, id := range f[1:] {
			s.hidden[id] = true
		}
		s.view()
	case "full":
		for i := range s.c.members {
			for _, id := range f[1:] {
				s.c.members[i].Full = s.c.members[i].Full || s.c.members[i].ID == id
			}
		}
		s.view()
	case "at":
		s.now = s.duration(f[1])
	case "ask":
		hops := 0
		if len(f) > 3 {
			hops = s.int(f[3])
		}
		p := blockdev.Prefetch
		if f[2] == "demand" {
			p = blockdev.Demand
		}
		s.ask = NewAsk(digest(s.int(f[1])), p, hops)
		return s.next()
	case "again":
		return s.next()
	case "patience":
		hedge, giveUp := s.book.Patience(f[1] == "demand")
		return fmt.Sprintf("hedge %v, give up %v", hedge, giveUp)
	case "hedge":
		return fmt.Sprint(s.book.Hedge(s.int(f[1])))
	case "outs":
		var out []string
		for _, m := range s.c.members {
			if s.book.Out(m.ID, s.now) {
				out = append(out, m.ID)
			}
		}
		return fmt.Sprintf("%d %s", s.book.Outs(s.now), strings.Join(out, " "))
	default:
		o, ok := outcomes[f[0]]
		if !ok {
			s.t.Fatalf("unknown command %q", f)
		}
		took, bytes := time.Millisecond, 0
		if len(f) > 2 {
			took, bytes = s.duration(f[1]), s.int(f[2])
		}
		s.group.Report(&s.ask, s.last, o, s.now, took, bytes)
	}
	return ""
}

func (s *script) view() {
	v := s.c.view(s.self, 3, func(m Member) bool { return !s.hidden[m.ID] })
	s.group = NewGroup(s.self, mustTable(s.t, v), s.book)
}

func (s *script) next() string {
	s.last = s.group.Next(&s.ask, s.now)
	switch s.last.Kind {
	case Supernode:
		return fmt.Sprintf("supernode, hops %d", s.last.Hops)
	case Later:
		return fmt.Sprintf("later, in %v", s.last.Wait)
	case Nobody:
		return "nobody"
	}
	if m := s.group.Table().Member(s.last.Index); m.ID != s.last.ID {
		s.t.Errorf("index %d is %s, not %s", s.last.Index, m.ID, s.last.ID)
	}
	return fmt.Sprintf("%s, hops %d", s.last.ID, s.last.Hops)
}

func (s *script) int(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

func (s *script) duration(text string) time.Duration {
	d, err := time.ParseDuration(text)
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.transcript")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			s := script{t: t}
			for line := range strings.Lines(string(want)) {
				command, _, _ := strings.Cut(strings.TrimRight(line, "\n"), " => ")
				got.WriteString(command)
				if f := strings.Fields(command); len(f) > 0 && f[0] != "#" {
					if answer := s.line(f); answer != "" {
						got.WriteString(" => " + answer)
					}
				}
				got.WriteString("\n")
			}
			if *update {
				if err := os.WriteFile(name, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got.String() != string(want) {
				t.Errorf("got:\n%s\nwant:\n%s", got.String(), want)
			}
		})
	}
}
