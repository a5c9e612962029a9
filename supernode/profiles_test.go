package supernode

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestProfiles: a node that was handed the index reports; the next one is handed
// the profile, also after a restart. Whatever else is said is refused.
func TestProfiles(t *testing.T) {
	reg := registrytest.StartReal(t, false)
	layers := []registrytest.Layer{registrytest.GzipLayer(t, "a", 700_000, 1), registrytest.GzipLayer(t, "b", 3000, 2)}
	reg.Push(t, "app", "v1", layers...)
	dir := filepath.Join(t.TempDir(), "data")
	s := start(t, at(dir))
	open := func(peer string) *blockdev.Image {
		t.Helper()
		img, err := s.OpenImageFor(t.Context(), peer, request(reg, "app:v1", nobody))
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	img := open("one")
	if img.Layers[0].Profile != nil {
		t.Error("a profile of an image that was never started")
	}
	info, err := index.Peek(img.Layers[0].Index)
	if err != nil {
		t.Fatal(err)
	}
	diff := layers[0].DiffID
	p := blockdev.DiffProfile{Diff: diff, Profile: blockdev.Profile{{Chunk: uint32(info.Chunks - 1), Rank: 0}, {Chunk: 0, Rank: 4}}}

	wantErr(t, s.ReportProfileFrom(t.Context(), "two", p), blockdev.ErrUnauthorized, diff.String())
	wantErr(t, s.ReportProfileFrom(t.Context(), "one", blockdev.DiffProfile{Diff: blockdev.Sum(nil), Profile: p.Profile}), blockdev.ErrUnauthorized)
	wantErr(t, s.ReportProfileFrom(t.Context(), "one", blockdev.DiffProfile{Diff: diff}), blockdev.ErrCorrupt)
	wantErr(t, s.ReportProfileFrom(t.Context(), "one", blockdev.DiffProfile{Diff: diff, Profile: blockdev.Profile{{Chunk: uint32(info.Chunks)}}}), blockdev.ErrCorrupt, "chunk")
	if err := s.ReportProfileFrom(t.Context(), "one", p); err != nil {
		t.Fatal(err)
	}
	img = open("two")
	if !reflect.DeepEqual(img.Layers[0].Profile, p.Profile) || img.Layers[1].Profile != nil {
		t.Errorf("handed out %v, %v", img.Layers[0].Profile, img.Layers[1].Profile)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = start(t, at(dir))
	img = open("") // the process that the supernode lives in
	if !reflect.DeepEqual(img.Layers[0].Profile, p.Profile) {
		t.Errorf("after a restart: %v", img.Layers[0].Profile)
	}
	if err := s.ReportProfiles(t.Context(), []blockdev.DiffProfile{p, {Diff: blockdev.Sum(nil)}}); err == nil {
		t.Error("one of two should have been refused")
	}
}

type profileEnv struct {
	*profiles
	now time.Time
}

func newProfiles(t *testing.T) *profileEnv {
	e := &profileEnv{now: time.Unix(1_000_000, 0)}
	p, err := openProfiles(t.TempDir(), slog.New(slog.DiscardHandler), func() time.Time { return e.now })
	if err != nil {
		t.Fatal(err)
	}
	e.profiles = p
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func (e *profileEnv) handedOut(t *testing.T, d blockdev.Digest) blockdev.Profile {
	t.Helper()
	img := &blockdev.Image{Layers: []blockdev.Layer{{DiffID: d}}}
	e.handOut("x", img)
	return img.Layers[0].Profile
}

// TestProfileReports: a profile is made of the newest starts, one of each peer,
// and one peer can neither crowd others out nor wear down the disk.
func TestProfileReports(t *testing.T) {
	e := newProfiles(t)
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

// TestProfilesAreBounded: the diffs that were reported on longest ago go.
func TestProfilesAreBounded(t *testing.T) {
	e := newProfiles(t)
	name := func(i uint32) blockdev.Digest { return blockdev.Sum(binary.LittleEndian.AppendUint32(nil, i)) }
	for i := range uint32(maxProfiles) {
		e.last[name(i)] = e.now.Add(time.Duration(i))
	}
	first := blockdev.DiffProfile{Diff: name(0), Profile: blockdev.Profile{{Chunk: 1}}}
	if err := e.add("a", first); err != nil { // known already: nothing goes
		t.Fatal(err)
	}
	e.last[name(0)] = e.now
	if err := e.add("a", blockdev.DiffProfile{Diff: name(maxProfiles), Profile: blockdev.Profile{{Chunk: 1}}}); err != nil {
		t.Fatal(err)
	}
	if n := len(e.last); n > maxProfiles*15/16 {
		t.Errorf("%d diffs are known", n)
	}
	if p := e.handedOut(t, name(0)); p != nil {
		t.Error("the oldest is still there")
	}
	if p := e.handedOut(t, name(maxProfiles)); p == nil {
		t.Error("the newest is not there")
	}
	// A peer's right to report ends.
	e.handOut("p", &blockdev.Image{Layers: []blockdev.Layer{{DiffID: name(1)}}})
	if !e.mayReport("p", name(1)) || e.mayReport("p", name(2)) || e.mayReport("q", name(1)) {
		t.Error("whoever was handed an index may report on it, nobody else")
	}
	e.now = e.now.Add(handedOutFor)
	if e.mayReport("p", name(1)) {
		t.Error("it may report for ever")
	}
}

// TestProfilesDamaged: a damaged file costs what was learned, no more.
func TestProfilesDamaged(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "profiles.db")
	if err := os.WriteFile(file, make([]byte, 32<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := openProfiles(dir, slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openProfiles(dir, slog.New(slog.DiscardHandler), time.Now); err == nil {
		t.Error("opened twice")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestReportLooksForRoomFirst: at a rollout most reports tell nothing new. They cost no
// index.
func TestReportLooksForRoomFirst(t *testing.T) {
	reg := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "a", 1000, 1)
	reg.Push(t, "app", "v1", l)
	s := start(t)
	p := blockdev.DiffProfile{Diff: l.DiffID, Profile: blockdev.Profile{{Chunk: 0}}}
	report := func(i int) {
		t.Helper()
		peer := fmt.Sprint("peer", i)
		if _, err := s.OpenImageFor(t.Context(), peer, request(reg.Target, "app:v1", nobody)); err != nil {
			t.Fatal(err)
		}
		if err := s.ReportProfileFrom(t.Context(), peer, p); err != nil {
			t.Fatal(err)
		}
	}
	for i := range maxReports {
		report(i)
	}
	peer := fmt.Sprint("peer", maxReports)
	if _, err := s.OpenImageFor(t.Context(), peer, request(reg.Target, "app:v1", nobody)); err != nil {
		t.Fatal(err)
	}
	if err := s.store.Remove(l.DiffID); err != nil { // whoever reads the index sees it
		t.Fatal(err)
	}
	if err := s.ReportProfileFrom(t.Context(), peer, p); err != nil {
		t.Errorf("a report for which there is no room: %v", err)
	}
	if err := s.ReportProfileFrom(t.Context(), "peer0", p); err == nil {
		t.Error("a report that would be kept, and the index was not read")
	}
}
