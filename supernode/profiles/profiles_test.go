package profiles

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

type env struct {
	*Profiles
	now time.Time
}

func newEnv(t *testing.T) *env {
	e := &env{now: time.Unix(1_000_000, 0)}
	p, err := Open(t.TempDir(), slog.New(slog.DiscardHandler), func() time.Time { return e.now })
	if err != nil {
		t.Fatal(err)
	}
	e.Profiles = p
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func (e *env) handedOut(t *testing.T, d blockdev.Digest) blockdev.Profile {
	t.Helper()
	img := &image.Image{Layers: []image.Layer{{DiffID: d}}}
	e.HandOut("x", img)
	return img.Layers[0].Profile
}

// TestReports: a profile is made of the newest starts, one of each peer,
// and one peer can neither crowd others out nor wear down the disk.
func TestReports(t *testing.T) {
	e := newEnv(t)
	d := blockdev.Sum([]byte("d"))
	report := func(peer string, chunk uint32) {
		t.Helper()
		if err := e.add(peer, blockdev.DiffProfile{Diff: d, Profile: blockdev.Profile{{Chunk: chunk, Rank: chunk}}}); err != nil {
			t.Fatal(err)
		}
	}
	want := func(what string, chunks ...uint32) {
		t.Helper()
		var got []uint32
		for _, touch := range e.handedOut(t, d) {
			got = append(got, touch.Chunk)
		}
		if !reflect.DeepEqual(got, chunks) {
			t.Errorf("%s: chunks %v, want %v", what, got, chunks)
		}
	}
	report("a", 1)
	want("one report", 1)
	for i := range uint32(10) {
		report("a", 2+i)
	}
	want("a peer's newest counts", 11)
	for i := range uint32(maxReports - 1) {
		report(fmt.Sprint("b", i), 20+i)
	}
	want("as many as there may be", 11, 20, 21, 22)
	report("late", 30)
	want("and no more for a while", 11, 20, 21, 22)
	e.now = e.now.Add(reportEvery)
	report("late", 30)
	want("the oldest goes", 20, 21, 22, 30)
}

// TestBounded: the diffs that were reported on longest ago go.
func TestBounded(t *testing.T) {
	e := newEnv(t)
	name := func(i uint32) blockdev.Digest { return blockdev.Sum(binary.LittleEndian.AppendUint32(nil, i)) }
	for i := range uint32(maxProfiles) {
		e.last.Add(name(i), struct{}{})
	}
	first := blockdev.DiffProfile{Diff: name(0), Profile: blockdev.Profile{{Chunk: 1}}}
	if err := e.add("a", first); err != nil { // known already: nothing goes
		t.Fatal(err)
	}
	if err := e.add("a", blockdev.DiffProfile{Diff: name(maxProfiles), Profile: blockdev.Profile{{Chunk: 1}}}); err != nil {
		t.Fatal(err)
	}
	if n := e.last.Len(); n != maxProfiles {
		t.Errorf("%d diffs are known", n)
	}
	if e.last.Contains(name(1)) {
		t.Error("the oldest is still there")
	}
	if p := e.handedOut(t, name(0)); p == nil {
		t.Error("one that was reported on again is gone")
	}
	if p := e.handedOut(t, name(maxProfiles)); p == nil {
		t.Error("the newest is not there")
	}
	// A peer's right to report ends.
	e.HandOut("p", &image.Image{Layers: []image.Layer{{DiffID: name(1)}}})
	if !e.mayReport("p", name(1)) || e.mayReport("p", name(2)) || e.mayReport("q", name(1)) {
		t.Error("whoever was handed an index may report on it, nobody else")
	}
	e.now = e.now.Add(handedOutFor)
	if e.mayReport("p", name(1)) {
		t.Error("it may report for ever")
	}
}

// TestDamaged: a damaged file costs what was learned, no more.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "profiles.db")
	if err := os.WriteFile(file, make([]byte, 32<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := Open(dir, slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, slog.New(slog.DiscardHandler), time.Now); err == nil {
		t.Error("opened twice")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestReportLooksForRoomFirst: at a rollout most reports tell nothing new. They cost no
// index.
func TestReportLooksForRoomFirst(t *testing.T) {
	e := newEnv(t)
	d := blockdev.DiffProfile{Diff: blockdev.Sum([]byte("d")), Profile: blockdev.Profile{{Chunk: 0}}}
	looks := 0
	report := func(peer string) bool {
		t.Helper()
		e.HandOut(peer, &image.Image{Layers: []image.Layer{{DiffID: d.Diff}}})
		kept, err := e.Report(peer, d, func() (int, error) {
			looks++
			return 1, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return kept
	}
	for i := range maxReports {
		if !report(fmt.Sprint("peer", i)) {
			t.Errorf("report %d is not kept", i)
		}
	}
	if looks != maxReports {
		t.Errorf("the index was looked at %d times for %d reports", looks, maxReports)
	}
	if report("late") || looks != maxReports {
		t.Error("a report for which there is no room is kept, or cost an index")
	}
	if !report("peer0") || looks != maxReports+1 {
		t.Error("a report that replaces the peer's own is not kept, or its index was not looked at")
	}
}

// TestRefused: a peer reports what it was handed, and what the diff has.
func TestRefused(t *testing.T) {
	e := newEnv(t)
	diff := blockdev.Sum([]byte("d"))
	e.HandOut("one", &image.Image{Layers: []image.Layer{{DiffID: diff}}})
	for what, c := range map[string]struct {
		peer    string
		profile blockdev.Profile
		want    error
	}{
		"another peer":  {"two", blockdev.Profile{{Chunk: 0}}, blockdev.ErrUnauthorized},
		"empty":         {"one", nil, blockdev.ErrCorrupt},
		"too long":      {"one", make(blockdev.Profile, blockdev.MaxProfile+1), blockdev.ErrCorrupt},
		"unknown chunk": {"one", blockdev.Profile{{Chunk: 7}}, blockdev.ErrCorrupt},
		"not an index":  {"one", blockdev.Profile{{Chunk: 0}}, blockdev.ErrNotFound},
	} {
		_, err := e.Report(c.peer, blockdev.DiffProfile{Diff: diff, Profile: c.profile}, func() (int, error) {
			if what == "not an index" {
				return 0, blockdev.ErrNotFound
			}
			return 7, nil
		})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if p := e.handedOut(t, diff); p != nil {
		t.Errorf("kept: %v", p)
	}
}
