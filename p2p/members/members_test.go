package members

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/p2p/wire"
)

// The tests of a node together with a supernode are in p2p/roster.

func TestReadTokens(t *testing.T) {
	good, other := "a token of some length", "another token of some length"
	for name, c := range map[string]struct {
		content string
		mode    os.FileMode
		want    []string
		says    string
	}{
		"one":          {good, 0o600, []string{good}, ""},
		"several":      {"# two\n\n  " + good + "  \r\n" + other + "\n", 0o640, []string{good, other}, ""},
		"none":         {"# nothing\n\n", 0o600, nil, "no token"},
		"short":        {good + "\nsecret\n", 0o600, nil, "line 2"},
		"long":         {strings.Repeat("x", wire.MaxToken+1), 0o600, nil, "at most"},
		"for everyone": {good, 0o644, nil, "chmod"},
		"huge":         {strings.Repeat("# comment\n", maxTokenFile/10+1), 0o600, nil, "not a file of tokens"},
	} {
		path := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		got, err := ReadTokens(path)
		if c.says == "" && (err != nil || !slices.Equal(got, c.want)) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: error %v, want one that says %q, and not what is in the file", name, err, c.says)
		}
	}
	if _, err := ReadTokens(filepath.Join(t.TempDir(), "nowhere")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func member(n byte) *wire.GroupMember {
	key := wire.Key{n}
	return &wire.GroupMember{Key: key[:], Rack: "r", Addrs: [][]byte{{10, 0, 0, n, 0x1e, 0x17}}}
}

func id(n byte) string { return string(host.FromKey(wire.Key{n})) }

func TestApply(t *testing.T) {
	home, other := &session{}, &session{}
	g := &group{id: blockdev.Digest{7}}
	whole := &wire.GroupUpdate{Version: 5, Cell: 1, Zone: "east", Joined: []*wire.GroupMember{member(1), member(2)},
		Cells: []*wire.GroupCell{{Cell: 2, Zone: "east", Gateways: []*wire.GroupMember{member(9), member(1)}}}}
	if err := g.apply(home, whole); err != nil {
		t.Fatal(err)
	}
	ids := func(ms []route.Member) (list []string) {
		for _, m := range ms {
			list = append(list, m.ID)
		}
		return list
	}
	check := func(version uint64, members, gateways []string) {
		t.Helper()
		v := g.view
		if v.Version != version || !slices.Equal(ids(v.Members), members) || !slices.Equal(ids(v.Gateways), gateways) {
			t.Errorf("version %d: %d members, %d gateways", v.Version, len(v.Members), len(v.Gateways))
		}
		if _, err := route.NewTable(*v); err != nil {
			t.Errorf("no view for route: %v", err)
		}
	}
	check(5, []string{id(1), id(2)}, []string{id(9)}) // not 1, which is in the own cell
	diff := &wire.GroupUpdate{Version: 8, From: 5, Cell: 1, Zone: "east", Joined: []*wire.GroupMember{member(3)}, Left: member(1).Key,
		Cells: []*wire.GroupCell{{Cell: 2}, {Cell: 4, Zone: "west", Gateways: []*wire.GroupMember{member(8)}}}}
	for name, bad := range map[string]struct {
		from   *session
		change func(*wire.GroupUpdate)
	}{
		"another version":   {home, func(u *wire.GroupUpdate) { u.From = 4 }},
		"another cell":      {home, func(u *wire.GroupUpdate) { u.Cell = 2 }},
		"another supernode": {other, func(*wire.GroupUpdate) {}},
	} {
		u := &wire.GroupUpdate{Version: 8, From: 5, Cell: 1, Joined: []*wire.GroupMember{member(3)}}
		bad.change(u)
		if err := g.apply(bad.from, u); err == nil {
			t.Errorf("an update of %s was applied", name)
		}
		check(5, []string{id(1), id(2)}, []string{id(9)})
	}
	if err := g.apply(home, diff); err != nil {
		t.Fatal(err)
	}
	check(8, []string{id(2), id(3)}, []string{id(8)})
	if g.find(host.FromKey(wire.Key{9})) != nil || g.find(host.FromKey(wire.Key{1})) != nil || g.find(host.FromKey(wire.Key{8})) == nil {
		t.Error("who is known is not who is in the view")
	}
	// On another stream it keeps what it says that it has, and what is new replaces it.
	if have := g.have(home); have != nil {
		t.Errorf("on the stream that the list is from, the node says that it has %v", have)
	}
	keep := &wire.GroupUpdate{Version: 8, Cell: 1, Zone: "east", KeepMembers: true, KeepCells: true}
	if err := g.apply(home, keep); err == nil {
		t.Error("the node keeps what it has not named")
	}
	home.stream++
	have := g.have(home)
	if have == nil || have.Cell != 1 || len(have.Cells) != 1 || have.Cells[0] != 4 ||
		have.Members != wire.ListSum([]uint64{member(2).Sum(), member(3).Sum()}) || have.Gateways[0] != wire.ListSum([]uint64{member(8).Sum()}) {
		t.Fatalf("it says that it has %v", have)
	}
	if err := g.apply(home, &wire.GroupUpdate{Version: 9, From: 8, Cell: 1, Joined: []*wire.GroupMember{member(5)}}); err == nil {
		t.Error("an update of another stream's version was applied")
	}
	if err := g.apply(home, &wire.GroupUpdate{Version: 8, Cell: 2, KeepMembers: true}); err == nil {
		t.Error("the members of another cell are kept")
	}
	if err := g.apply(home, keep); err != nil {
		t.Error(err)
	}
	check(8, []string{id(2), id(3)}, []string{id(8)})
	g.have(other)
	if err := g.apply(other, &wire.GroupUpdate{Version: 3, Cell: 1, Zone: "east", KeepCells: true, Joined: []*wire.GroupMember{member(2)},
		Cells: []*wire.GroupCell{{Cell: 5, Zone: "west", Gateways: []*wire.GroupMember{member(9)}}}}); err != nil {
		t.Error(err)
	}
	check(3, []string{id(2)}, []string{id(8), id(9)})
	home.stream++
	g.have(home)
	if err := g.apply(home, &wire.GroupUpdate{Version: 8, Cell: 1, Zone: "east", KeepMembers: true, KeepCells: true, Joined: []*wire.GroupMember{member(3)},
		Cells: []*wire.GroupCell{{Cell: 5}}}); err != nil {
		t.Error(err)
	}
	check(8, []string{id(2), id(3)}, []string{id(8)})
	g.anew = true
	if home.stream++; g.have(home) != nil {
		t.Error("after an update that did not fit the node says that it has something")
	}
	g.anew = false
	for i := range uint32(wire.MaxHaveCells) { // too many to be named: they are told anew
		g.cells[100+i] = g.cells[4]
	}
	if have := g.have(home); have == nil || len(have.Cells) != 0 {
		t.Errorf("%v", have)
	}
	if err := g.apply(home, &wire.GroupUpdate{Version: 8, Cell: 1, Zone: "east", KeepMembers: true, KeepCells: true,
		Cells: []*wire.GroupCell{{Cell: 4, Zone: "west", Gateways: []*wire.GroupMember{member(8)}}}}); err != nil || len(g.cells) != 1 {
		t.Errorf("%v, %d cells", err, len(g.cells))
	}
	// Who shares nothing is not to be asked.
	silent := member(4)
	silent.Addrs = nil
	quiet := &wire.GroupUpdate{Version: 9, From: 8, Cell: 1, Zone: "east", Joined: []*wire.GroupMember{silent},
		Cells: []*wire.GroupCell{{Cell: 4, Zone: "west", Gateways: []*wire.GroupMember{member(8), silent}}}}
	if err := g.apply(home, quiet); err != nil {
		t.Fatal(err)
	}
	check(9, []string{id(2), id(3)}, []string{id(8)})
	// More than route takes is no view.
	var many []*wire.GroupMember
	for i := range route.MaxMembers + 1 {
		key := wire.Key{byte(i), byte(i >> 8), 1}
		many = append(many, &wire.GroupMember{Key: key[:], Addrs: member(1).Addrs})
	}
	if err := g.apply(home, &wire.GroupUpdate{Version: 10, Cell: 1, Joined: many}); !errors.Is(err, blockdev.ErrCorrupt) || g.view != nil {
		t.Errorf("too many members: %v", err)
	}
}

func TestConfig(t *testing.T) {
	info := peer.AddrInfo{ID: host.FromKey(wire.Key{1})}
	token := func() (string, error) { return "", nil }
	for name, c := range map[string]Config{
		"no supernode":  {Token: token},
		"no token":      {Supernodes: []peer.AddrInfo{info}},
		"twice":         {Supernodes: []peer.AddrInfo{info, info}, Token: token},
		"zone":          {Supernodes: []peer.AddrInfo{info}, Token: token, Zone: strings.Repeat("z", 65)},
		"negative rate": {Supernodes: []peer.AddrInfo{info}, Token: token, MaxUpload: -1},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
