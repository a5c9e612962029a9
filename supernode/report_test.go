package supernode

import (
	"path/filepath"
	"reflect"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/image"
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
	open := func(peer string) *image.Image {
		t.Helper()
		img, err := s.FetchIndexesFor(t.Context(), peer, request(reg, "app:v1", nobody))
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
