package wire

import (
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
		"no token":           hello(func(h *Hello) { h.Token = "" }),
		"long token":         hello(func(h *Hello) { h.Token = strings.Repeat("x", MaxToken+1) }),
		"no instance":        hello(func(h *Hello) { h.Instance = nil }),
		"long zone":          hello(func(h *Hello) { h.Zone = strings.Repeat("z", MaxLabel+1) }),
		"rack of two lines":  hello(func(h *Hello) { h.Rack = "a\nb" }),
		"many addresses":     hello(func(h *Hello) { h.Addrs = make([][]byte, MaxAddrs+1) }),
		"port 0":             hello(func(h *Hello) { h.Addrs = [][]byte{{10, 0, 0, 1, 0, 0}} }),
		"0.0.0.0":            hello(func(h *Hello) { h.Addrs = [][]byte{{0, 0, 0, 0, 1, 1}} }),
		"an address cut":     hello(func(h *Hello) { h.Addrs = [][]byte{{1, 2, 3}} }),
		"short group":        {Part: &MemberRequest_Join{Join: &GroupJoin{Group: []byte{1}}}},
		"long grant":         {Part: &MemberRequest_Join{Join: &GroupJoin{Group: digests(1), Grant: make([]byte, MaxGrant+1)}}},
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
