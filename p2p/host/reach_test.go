package host

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// Interfaces as Docker, CNI plugins and kube-proxy make them, and as machines have them.
func TestInner(t *testing.T) {
	const (
		eth0 = iota + 1
		eth1
		bond0
		br0
		docker0
		veth
		virbr0
		tap
		cni0
		ipvs
		flannel
		ciliumHost
		ciliumNet
		podEth
		lo
	)
	machine := map[int]link{
		lo: {}, eth0: {}, eth1: {master: bond0}, bond0: {kind: "bond", master: br0}, br0: {kind: "bridge"},
		docker0: {kind: "bridge"}, veth: {kind: "veth", master: docker0},
		virbr0: {kind: "bridge"}, tap: {kind: "tun", master: virbr0},
		cni0: {kind: "bridge"}, ipvs: {kind: "dummy"}, flannel: {kind: "vxlan"},
		ciliumHost: {kind: "veth", beside: true}, ciliumNet: {kind: "veth", beside: true}, podEth: {kind: "veth"},
	}
	inner := []int{docker0, virbr0, cni0, ipvs, flannel, ciliumHost, ciliumNet}
	for i := range machine {
		if got := isInner(machine, i); got != slices.Contains(inner, i) {
			t.Errorf("%+v: %v", machine[i], got)
		}
	}
	if isInner(nil, eth0) {
		t.Error("an interface that the kernel does not name is taken for none")
	}
	// The kernel's own answer: there is a loopback device, and it is no other kind.
	if real, err := links(); err != nil || len(real) == 0 {
		t.Fatalf("%d interfaces, %v", len(real), err)
	}
}

// Of two addresses, which a name may stand for, one that takes connections and says
// nothing does not hold up the other.
func TestOneOfTwoAddresses(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	server := newHost(t, Config{Listen: []string{"[::1]:0"}})
	first, err := manet.FromNetAddr(silent.Addr())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), dialTimeout) // after which the first has failed
	defer cancel()
	info := peer.AddrInfo{ID: server.ID(), Addrs: append([]ma.Multiaddr{first}, server.Addrs()...)}
	if err := newHost(t, Config{}).Connect(ctx, info); err != nil {
		t.Error(err)
	}
}

// Listening on all addresses is listening on those of both families, may be asked for
// twice, and says so if a port is taken in one of them.
func TestListenOnAll(t *testing.T) {
	h := newHost(t, Config{Listen: []string{"127.0.0.1:0"}})
	port := Addrs(h)[0]
	port = port[strings.LastIndex(port, ":"):]
	other := newHost(t, Config{})
	if err := Listen(other, port); err == nil {
		t.Error("no error where the port is taken")
	}
	both := newHost(t, Config{Listen: []string{"[::1]:0"}})
	port = Addrs(both)[0]
	port = port[strings.LastIndex(port, ":"):]
	if err := Listen(other, port); err == nil {
		t.Error("no error where the port is taken with IPv6")
	}
	if err := both.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Listen(other, port); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(other.Network().ListenAddresses()); got != 2 {
		t.Errorf("listening on %v", other.Network().ListenAddresses())
	}
	// For who is on this machine, and by name.
	for _, a := range Toward(other, ma.StringCast("/ip4/127.0.0.1/tcp/1")) {
		if a.Addr().IsLinkLocalUnicast() || a.Addr().IsUnspecified() {
			t.Errorf("%s is told", a)
		}
	}
	named := newHost(t, Config{Listen: []string{"127.0.0.1:0"}})
	want := netip.MustParseAddrPort(strings.SplitAfter(Addrs(named)[0], "@")[1])
	if got := Toward(named, ma.StringCast("/ip4/192.0.2.1/tcp/1")); !slices.Equal(got, []netip.AddrPort{want}) {
		t.Errorf("listening on %s, told %v", want, got)
	}
}
