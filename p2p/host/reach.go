package host

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// reach remembers for a moment which addresses of this machine others may be told.
type reach struct {
	mu    sync.Mutex
	at    time.Time
	inner map[netip.Addr]bool
}

// reachTime is for how long what was found counts. Interfaces come and go with pods.
const reachTime = 5 * time.Second

// others removes addresses from those that listening on all addresses stands for: such
// as mean nothing to other machines. What h, if it is there yet, listens on by name stays.
func (r *reach) others(h libp2phost.Host, addrs []ma.Multiaddr) []ma.Multiaddr {
	r.mu.Lock()
	if r.inner == nil || time.Since(r.at) >= reachTime {
		_, r.inner = interfaces()
		r.at = time.Now()
	}
	inner := r.inner
	r.mu.Unlock()
	var named []ma.Multiaddr
	if h != nil {
		named = h.Network().ListenAddresses()
	}
	out := make([]ma.Multiaddr, 0, len(addrs))
	for _, a := range addrs {
		ap, ok := addrPort(a)
		if ok && (inner[ap.Addr()] || ap.Addr().IsLinkLocalUnicast()) && !slices.ContainsFunc(named, a.Equal) {
			continue
		}
		out = append(out, a)
	}
	return out
}

// interfaces returns the interface, by index, that has an address, and the addresses
// that lead to nothing but this machine and what runs on it.
func interfaces() (of map[netip.Addr]int, inner map[netip.Addr]bool) {
	of, inner = map[netip.Addr]int{}, map[netip.Addr]bool{}
	links, err := links()
	if err != nil {
		links = nil // then all are taken for real ones
	}
	all, err := net.Interfaces()
	if err != nil {
		return of, inner
	}
	for _, i := range all {
		addrs, err := i.Addrs()
		if err != nil {
			continue // it has gone
		}
		only := i.Flags&net.FlagUp == 0 || isInner(links, i.Index)
		for _, a := range addrs {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			ip, ok := netip.AddrFromSlice(n.IP)
			if !ok {
				continue
			}
			of[ip.Unmap()] = i.Index
			if only {
				inner[ip.Unmap()] = true
			}
		}
	}
	return of, inner
}

// link is what the kernel says of an interface.
type link struct {
	kind   string // as `ip -d link` shows it; empty: a network card, or lo
	master int    // the bridge or bond that it is a port of; 0: none
	beside bool   // its other end is an interface here, too
}

// Attributes of RTM_NEWLINK (linux/if_link.h) that package syscall does not name.
const (
	iflaLinkInfo  = 18
	iflaNetnsID   = 37
	iflaInfoKind  = 1
	nlaTypeMask   = 0x3fff
	nlaHeaderSize = 4
)

// links asks the kernel for all interfaces of this network namespace, by their index.
func links() (map[int]link, error) {
	table, err := syscall.NetlinkRIB(syscall.RTM_GETLINK, syscall.AF_UNSPEC)
	if err != nil {
		return nil, err
	}
	messages, err := syscall.ParseNetlinkMessage(table)
	if err != nil {
		return nil, err
	}
	found := map[int]link{}
	for i := range messages {
		m := &messages[i]
		if m.Header.Type != syscall.RTM_NEWLINK || len(m.Data) < syscall.SizeofIfInfomsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(m)
		if err != nil {
			return nil, err
		}
		var l link
		var peer, away bool
		for _, a := range attrs {
			switch a.Attr.Type & nlaTypeMask {
			case syscall.IFLA_MASTER:
				l.master = int(binary.NativeEndian.Uint32(a.Value))
			case syscall.IFLA_LINK:
				peer = binary.NativeEndian.Uint32(a.Value) != 0
			case iflaNetnsID:
				away = true
			case iflaLinkInfo:
				l.kind = infoKind(a.Value)
			}
		}
		l.beside = peer && !away
		found[int(binary.NativeEndian.Uint32(m.Data[4:]))] = l // struct ifinfomsg: family, pad, type, index
	}
	return found, nil
}

// infoKind returns IFLA_INFO_KIND out of the attributes in IFLA_LINKINFO.
func infoKind(b []byte) string {
	for len(b) >= nlaHeaderSize {
		n := int(binary.NativeEndian.Uint16(b))
		if n < nlaHeaderSize || n > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[2:])&nlaTypeMask == iflaInfoKind {
			kind := b[nlaHeaderSize:n]
			if i := slices.Index(kind, 0); i >= 0 {
				kind = kind[:i]
			}
			return string(kind)
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return ""
}

// isInner says whether an interface leads to nothing but this machine and what runs on
// it: a bridge whose ports are all of containers or virtual machines (docker0, cni0,
// virbr0), a dummy (kube-ipvs0 has the addresses of all services), a pair of ends that are
// both here (cilium_host), or a tunnel of the pods' network. What it is tells
// the kernel; names are anybody's choice.
func isInner(links map[int]link, index int) bool {
	l, ok := links[index]
	if !ok {
		return false
	}
	switch l.kind {
	case "dummy", "vxlan", "geneve", "ipip", "sit", "ip6tnl":
		return true
	case "veth":
		return l.beside
	case "bridge":
		for _, port := range links {
			if port.master == index && port.kind != "veth" && port.kind != "tun" {
				return false
			}
		}
		return true
	}
	return false
}

// addrPort reads /ip4/192.0.2.1/tcp/7 and its like.
func addrPort(a ma.Multiaddr) (netip.AddrPort, bool) {
	na, err := manet.ToNetAddr(a)
	if err != nil {
		return netip.AddrPort{}, false
	}
	tcp, ok := na.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, false
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), true
}

// Toward returns where this host is to be dialed by machines that are where the other end of a
// connection is, local being this end: the address that the connection has here first,
// and then others of the same interface, which may be of the other family. An address
// of another interface is another network's, which they may not be in. A host that
// listens on certain addresses alone is told of as it listens.
func Toward(h libp2phost.Host, local ma.Multiaddr) []netip.AddrPort {
	var out []netip.AddrPort
	add := func(ap netip.AddrPort) {
		if ap.Port() != 0 && !slices.Contains(out, ap) {
			out = append(out, ap)
		}
	}
	var listens []netip.AddrPort
	for _, a := range h.Network().ListenAddresses() {
		if ap, ok := addrPort(a); ok {
			listens = append(listens, ap)
		}
	}
	var own netip.Addr
	if ap, ok := addrPort(local); ok {
		own = ap.Addr().WithZone("")
	}
	usable := own.IsValid() && !own.IsLoopback() && !own.IsLinkLocalUnicast()
	of, inner := interfaces()
	at, known := of[own]
	var all, loop []netip.Addr // what listening on all addresses stands for
	for ip, i := range of {
		switch {
		case ip.IsLinkLocalUnicast():
		case ip.IsLoopback():
			loop = append(loop, ip)
		case usable && known && i == at, !(usable && known) && !inner[ip]:
			all = append(all, ip)
		}
	}
	slices.SortFunc(all, func(a, b netip.Addr) int { return a.Compare(b) })
	if len(all) == 0 {
		all = loop // everybody is on this machine
	}
	for _, ip := range append([]netip.Addr{own}, all...) {
		for _, l := range listens {
			if l.Addr().IsUnspecified() && l.Addr().Is4() == ip.Is4() && (usable || ip != own) {
				add(netip.AddrPortFrom(ip, l.Port()))
			}
		}
	}
	for _, l := range listens {
		if !l.Addr().IsUnspecified() {
			add(l)
		}
	}
	return out
}
