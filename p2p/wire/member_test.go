package wire

import (
	"bufio"
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
)

func TestMemberLimits(t *testing.T) {
	hello := func(change func(*Hello)) *MemberRequest {
		h := &Hello{Token: "a token of some length", Instance: make([]byte, InstanceLen)}
		change(h)
		return &MemberRequest{Part: &MemberRequest_Hello{Hello: h}}
	}
	for name, m := range map[string]*MemberRequest{
		"no token":          hello(func(h *Hello) { h.Token = "" }),
		"long token":        hello(func(h *Hello) { h.Token = strings.Repeat("x", MaxToken+1) }),
		"no instance":       hello(func(h *Hello) { h.Instance = nil }),
		"long zone":         hello(func(h *Hello) { h.Zone = strings.Repeat("z", MaxLabel+1) }),
		"rack of two lines": hello(func(h *Hello) { h.Rack = "a\nb" }),
		"many addresses":    hello(func(h *Hello) { h.Addrs = make([][]byte, MaxAddrs+1) }),
		"port 0":            hello(func(h *Hello) { h.Addrs = [][]byte{{10, 0, 0, 1, 0, 0}} }),
		"0.0.0.0":           hello(func(h *Hello) { h.Addrs = [][]byte{{0, 0, 0, 0, 1, 1}} }),
		"an address cut":    hello(func(h *Hello) { h.Addrs = [][]byte{{1, 2, 3}} }),
		"short group":       {Part: &MemberRequest_Join{Join: &GroupJoin{Group: []byte{1}}}},
		"long grant":        {Part: &MemberRequest_Join{Join: &GroupJoin{Group: digests(1), Grant: make([]byte, MaxGrant+1)}}},
		"unequal sums":      {Part: &MemberRequest_Join{Join: &GroupJoin{Group: digests(1), Have: &GroupHave{Cells: []uint32{1}}}}},
		"many cells": {Part: &MemberRequest_Join{Join: &GroupJoin{Group: digests(1),
			Have: &GroupHave{Cells: make([]uint32, MaxHaveCells+1), Gateways: make([]uint64, MaxHaveCells+1)}}}},
		"leave without":      {Part: &MemberRequest_Leave{Leave: &GroupLeave{}}},
		"who is nobody":      {Part: &MemberRequest_Who{Who: &Who{}}},
		"who are all these":  {Part: &MemberRequest_Who{Who: &Who{Keys: digests(MaxWho + 1)}}},
		"who is half a peer": {Part: &MemberRequest_Who{Who: &Who{Keys: make([]byte, 40)}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := ParseMemberRequest(b); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	member := &GroupMember{Key: digests(1)}
	update := func(change func(*GroupUpdate)) *MemberEvent {
		u := &GroupUpdate{Group: digests(1), Version: 2, From: 1, Joined: []*GroupMember{member}}
		change(u)
		return &MemberEvent{Part: &MemberEvent_Update{Update: u}}
	}
	for name, m := range map[string]*MemberEvent{
		"no lease":           {Part: &MemberEvent_Welcome{Welcome: &Welcome{}}},
		"a lease for ever":   {Part: &MemberEvent_Welcome{Welcome: &Welcome{LeaseMs: 1 << 30}}},
		"back in time":       update(func(u *GroupUpdate) { u.From = 2 }),
		"version 0":          update(func(u *GroupUpdate) { u.Version, u.From = 0, 0 }),
		"no group":           update(func(u *GroupUpdate) { u.Group = nil }),
		"half a key":         update(func(u *GroupUpdate) { u.Left = make([]byte, 33) }),
		"member without key": update(func(u *GroupUpdate) { u.Joined = []*GroupMember{{}} }),
		"nine gateways": update(func(u *GroupUpdate) {
			u.Cells = []*GroupCell{{Gateways: []*GroupMember{member, member, member, member, member, member, member, member, member}}}
		}),
		"kept and from":      update(func(u *GroupUpdate) { u.KeepMembers = true }),
		"refusal of nothing": {Part: &MemberEvent_Refusal{Refusal: &GroupRefusal{}}},
		"answer for nobody":  {Part: &MemberEvent_Answer{Answer: &Answer{}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := ParseMemberEvent(b); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAddr(t *testing.T) {
	for s, want := range map[string]string{
		"10.0.0.5:7703":          "10.0.0.5:7703",
		"[2001:db8::1]:80":       "[2001:db8::1]:80",
		"[::ffff:10.0.0.5]:7703": "10.0.0.5:7703",
		"[fe80::1%eth0]:1":       "[fe80::1]:1",
	} {
		got, err := ParseAddr(AppendAddr(nil, netip.MustParseAddrPort(s)))
		if err != nil || got.String() != want {
			t.Errorf("%s becomes %s, %v", s, got, err)
		}
	}
}

// A join with all that may be in it is within what earlier supernodes take, too.
func TestLargestJoin(t *testing.T) {
	have := &GroupHave{Cell: 1 << 31, Members: 1}
	for i := range uint32(MaxHaveCells) {
		have.Cells, have.Gateways = append(have.Cells, 1<<31+i), append(have.Gateways, ^uint64(0))
	}
	m := &MemberRequest{Part: &MemberRequest_Join{Join: &GroupJoin{Group: digests(1), Grant: make([]byte, MaxGrant), Full: true, Have: have}}}
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > MaxMemberRequest {
		t.Errorf("%d bytes, at most %d are taken", len(b), MaxMemberRequest)
	}
	if _, err := ParseMemberRequest(b); err != nil {
		t.Error(err)
	}
}

// A sum says everything that a list says, in whatever order.
func TestSums(t *testing.T) {
	base := func() *GroupMember {
		return &GroupMember{Key: digests(1), Rack: "r1", Addrs: [][]byte{{10, 0, 0, 1, 0, 80}, {10, 0, 0, 2, 0, 80}}}
	}
	seen := map[uint64]string{base().Sum(): "nothing"}
	for name, change := range map[string]func(*GroupMember){
		"key":               func(m *GroupMember) { m.Key[3]++ },
		"rack":              func(m *GroupMember) { m.Rack = "r2" },
		"no rack":           func(m *GroupMember) { m.Rack = "" },
		"full":              func(m *GroupMember) { m.Full = true },
		"address":           func(m *GroupMember) { m.Addrs[0][5]++ },
		"order":             func(m *GroupMember) { m.Addrs[0], m.Addrs[1] = m.Addrs[1], m.Addrs[0] },
		"address less":      func(m *GroupMember) { m.Addrs = m.Addrs[:1] },
		"an address, moved": func(m *GroupMember) { m.Rack, m.Addrs = "r1\x06\x0a\x00\x00\x01\x00P", m.Addrs[1:] },
	} {
		m := base()
		change(m)
		if other, twice := seen[m.Sum()]; twice {
			t.Errorf("a change of %s has the sum of a change of %s", name, other)
		}
		seen[m.Sum()] = name
	}
	if ListSum([]uint64{1, 2, 3}) != ListSum([]uint64{3, 1, 2}) {
		t.Error("the order counts")
	}
	if ListSum([]uint64{1, 2}) == ListSum([]uint64{1, 2, 2}) || ListSum(nil) == ListSum([]uint64{0}) {
		t.Error("different lists have one sum")
	}
	// What other implementations are to compute.
	if got := base().Sum(); got != 0xc4f71f0322097d2a {
		t.Errorf("%#x", got)
	}
}

// An update that is put together is read as one that is encoded as a whole.
func TestAppendUpdate(t *testing.T) {
	cells := []*GroupCell{{Cell: 300, Zone: "east", Gateways: []*GroupMember{{Key: digests(1), Rack: "r"}}}, {Cell: 5}}
	var encoded [][]byte
	for _, c := range cells {
		b, err := AppendCell(nil, c)
		if err != nil {
			t.Fatal(err)
		}
		encoded = append(encoded, b)
	}
	update := func() *GroupUpdate { return &GroupUpdate{Group: digests(1), Version: 9, Cell: 1, Zone: "west"} }
	got, err := AppendUpdate([]byte("before"), update(), encoded)
	if err != nil {
		t.Fatal(err)
	}
	want := update()
	want.Cells = cells
	b, err := ReadFrame(bufio.NewReader(bytes.NewReader(got[len("before"):])), MaxMemberEvent, nil)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := ParseMemberEvent(b)
	if err != nil || !proto.Equal(ev.GetUpdate(), want) {
		t.Errorf("%v, %v", ev, err)
	}
	if whole, err := AppendMessage(nil, &MemberEvent{Part: &MemberEvent_Update{Update: want}}); err != nil || len(whole) != len(got)-len("before") {
		t.Errorf("%d bytes, and %d when encoded as a whole, %v", len(got)-len("before"), len(whole), err)
	}
}
