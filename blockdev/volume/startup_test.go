package volume

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
)

// sink takes profiles.
type sink struct {
	mu   sync.Mutex
	got  []blockdev.DiffProfile
	fail error
}

func (s *sink) ReportProfiles(_ context.Context, p []blockdev.DiffProfile) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = append(s.got, p...)
	return s.fail
}

// TestLearnedStart: what a container reads on one node is reported, and fetched
// on the next one before anybody reads.
func TestLearnedStart(t *testing.T) {
	learned := &sink{}
	first := newNode(t, func(c *Config) {
		c.Cache.ReadAhead = -1
		c.Cache.Quiet = 1 << 40 // no prefetch during this test
		c.Cache.GiveWay = 1 << 40
	}, func(u *Upstream) { u.Profiles = learned })
	l, unread := newLayer(t, 1, 4<<20), newLayer(t, 2, 1<<20)
	first.add(l)
	first.add(unread)
	f, err := os.Open(filepath.Join(first.mountDir(l), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	first.mountDir(unread)
	first.ContainerStarts(l.id, unread.id) // as when a container starts
	first.checkPart(l, f, 3<<20, 100)
	first.checkPart(l, f, 1000, 100)
	first.ContainerStarts(l.id, unread.id) // a second container: reads of the first one are in the page cache
	f.Close()
	if err := first.UnmountAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	learned.mu.Lock()
	profiles := learned.got
	learned.mu.Unlock()
	if len(profiles) != 1 || profiles[0].Diff != l.id || len(profiles[0].Profile) < 2 {
		t.Fatalf("reported %v", profiles)
	}
	at := func(off int64) uint32 {
		i := slices.IndexFunc(l.index.Chunks, func(c blockdev.Chunk) bool { return off < c.Offset+int64(c.Length) })
		return uint32(i)
	}
	if first := profiles[0].Profile[0].Chunk; first != at(3<<20) {
		t.Errorf("the first chunk is %d, what was read first is in %d", first, at(3<<20))
	}

	next := newNode(t, nil)
	next.add(l)
	next.mountDir(l)
	hostile := blockdev.DiffProfile{Diff: blockdev.Sum([]byte("unknown")), Profile: blockdev.Profile{{Chunk: 1}}}
	beyond := append(slices.Clone(profiles[0].Profile), blockdev.Touch{Chunk: 1 << 31, Rank: 1 << 31})
	next.FetchStartup([]blockdev.DiffProfile{hostile, {Diff: l.id, Profile: beyond}})
	var want int64
	for _, touch := range profiles[0].Profile {
		want += int64(l.index.Chunks[touch.Chunk].Length)
	}
	next.eventually("the startup chunks are there", func() bool { return next.stat(l).Local >= want })
	next.startups.tasks.Close()
	if s := next.stat(l); s.Local != want {
		t.Errorf("%d bytes are there before anybody has read, want %d", s.Local, want)
	}
	if c := next.Counters(); c.StartupBytes != want || c.Missed != 0 {
		t.Errorf("%+v", c)
	}
}

// TestReportFails: nobody takes the report; nothing else comes of it.
func TestReportFails(t *testing.T) {
	learned := &sink{fail: errors.New("no")}
	n := newNode(t, nil, func(u *Upstream) { u.Profiles = learned })
	l := newLayer(t, 1, 1<<20)
	n.add(l)
	dir := n.mountDir(l)
	n.ContainerStarts(l.id)
	n.check(l, dir)
	n.restart()
	if len(learned.got) != 1 {
		t.Errorf("reported %d times", len(learned.got))
	}
	n.check(l, n.mountDir(l))
}

// TestStartupLine: by rank over all diffs, one request a diff in each window;
// diffs that are not there are passed over, and the whole is bounded.
func TestStartupLine(t *testing.T) {
	m := &Manager{cache: new(cache.Cache), cfg: Config{Log: slog.New(slog.DiscardHandler)}, vols: map[blockdev.Digest]*volume{}}
	names := map[*volume]string{}
	for _, name := range []string{"a", "b"} {
		d := &fakeDiff{name: name}
		v := &volume{id: d.ID(), diff: d}
		m.vols[v.id] = v
		names[v] = name
	}
	id := func(name string) blockdev.Digest { return blockdev.Sum([]byte(name)) }
	var a, b, many blockdev.Profile
	for i := range uint32(startupWindow) {
		a = append(a, blockdev.Touch{Chunk: 100 + i, Rank: 2 * i})
		b = append(b, blockdev.Touch{Chunk: 200 + i, Rank: 2*i + 1})
	}
	var got []string
	var chunks [][]uint32
	for _, r := range startupLine([]blockdev.DiffProfile{{Diff: id("c"), Profile: a}, {Diff: id("a"), Profile: a}, {Diff: id("b"), Profile: b}}, m.volume) {
		got = append(got, names[r.v])
		chunks = append(chunks, r.chunks)
	}
	if want := []string{"a", "b", "a", "b"}; !reflect.DeepEqual(got, want) {
		t.Errorf("requests for %v, want %v", got, want)
	}
	if len(chunks) == 4 && (!reflect.DeepEqual(chunks[0], []uint32{100, 101, 102, 103, 104, 105, 106, 107}) || chunks[3][0] != 208) {
		t.Errorf("chunks %v", chunks)
	}

	for i := range uint32(3 * blockdev.MaxProfile) {
		many = append(many, blockdev.Touch{Chunk: i, Rank: i})
	}
	n := 0
	for _, r := range startupLine([]blockdev.DiffProfile{{Diff: id("a"), Profile: many}, {Diff: id("b"), Profile: many}, {Diff: id("a"), Profile: many}}, m.volume) {
		n += len(r.chunks)
	}
	if n != maxStartup {
		t.Errorf("%d chunks, want %d", n, maxStartup)
	}
}

// TestStartupEndsWithTheManager: fetches that are under way do not keep it from
// closing, and what fails is left to reads.
func TestStartupEndsWithTheManager(t *testing.T) {
	s := newStartups(slog.New(slog.DiscardHandler), newLate())
	m := &Manager{cache: new(cache.Cache), cfg: Config{Log: slog.New(slog.DiscardHandler)}, vols: map[blockdev.Digest]*volume{}, startups: s}
	began := make(chan struct{}, 1)
	d := &fakeDiff{name: "a"}
	d.startup = func([]uint32) error {
		select {
		case began <- struct{}{}:
		default:
		}
		<-s.tasks.Context().Done()
		return cache.ErrClosed
	}
	m.vols[d.ID()] = &volume{id: d.ID(), diff: d}
	var p blockdev.Profile
	for i := range uint32(10 * startupWindow) {
		p = append(p, blockdev.Touch{Chunk: i, Rank: i})
	}
	m.FetchStartup([]blockdev.DiffProfile{{Diff: d.ID(), Profile: p}})
	<-began
	s.tasks.Close()
	m.FetchStartup([]blockdev.DiffProfile{{Diff: d.ID(), Profile: p}}) // after the end: nothing
}
