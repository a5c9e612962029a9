package host

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// ParseAddr reads a supernode's address as it stands in the config,
// "ID@host:port". The host is a name, an IPv4 address, or an IPv6 address in
// brackets.
func ParseAddr(s string) (peer.AddrInfo, error) {
	fail := func(why string) (peer.AddrInfo, error) {
		return peer.AddrInfo{}, fmt.Errorf("supernode address %.200q: %s; it is ID@host:port, as the supernode prints it when it starts", s, why)
	}
	if strings.HasPrefix(s, "/") {
		return fail("this is a libp2p multiaddr")
	}
	enc, hostport, ok := strings.Cut(s, "@")
	if !ok {
		return fail("the peer ID is missing")
	}
	id, err := peer.Decode(enc)
	if err != nil {
		return fail("the part before @ is not a peer ID")
	}
	name, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return fail(err.Error())
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fail("the port is not a number from 1 to 65535")
	}
	if name == "" {
		return fail("the host is missing")
	}
	addr, err := multiaddr(name, port)
	if err != nil {
		return fail(err.Error())
	}
	return peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{addr}}, nil
}

// FormatAddr returns the address of the peer id as ParseAddr reads it. addr must
// begin with an IP address or a name, and a TCP port.
func FormatAddr(id peer.ID, addr ma.Multiaddr) (string, error) {
	hostport, err := hostPort(addr)
	if err != nil {
		return "", err
	}
	return id.String() + "@" + hostport, nil
}

// Addrs returns the lines that an operator pastes into a node's config, one for
// each address that h can be reached at; what other machines can reach first.
func Addrs(h libp2phost.Host) []string {
	var remote, local []string
	for _, a := range h.Addrs() {
		line, err := FormatAddr(h.ID(), a)
		if err != nil {
			continue // not an address that ParseAddr can name
		}
		hostport, _ := hostPort(a)
		if ap, err := netip.ParseAddrPort(hostport); err == nil && ap.Addr().IsLoopback() {
			local = append(local, line)
		} else {
			remote = append(remote, line)
		}
	}
	slices.Sort(remote)
	slices.Sort(local)
	return append(remote, local...)
}

// hostPort turns /ip4/192.0.2.1/tcp/7 into 192.0.2.1:7.
func hostPort(addr ma.Multiaddr) (string, error) {
	for _, code := range []int{ma.P_IP4, ma.P_IP6, ma.P_DNS, ma.P_DNS4, ma.P_DNS6} {
		name, err := addr.ValueForProtocol(code)
		if err != nil {
			continue
		}
		port, err := addr.ValueForProtocol(ma.P_TCP)
		if err != nil {
			break
		}
		return net.JoinHostPort(name, port), nil
	}
	return "", fmt.Errorf("address %s has no host and TCP port", addr)
}

// multiaddr turns a host and a port into libp2p's form.
func multiaddr(name, port string) (ma.Multiaddr, error) {
	kind := "dns"
	if ip, err := netip.ParseAddr(name); err == nil {
		if ip.Zone() != "" {
			return nil, fmt.Errorf("an IPv6 zone (%s) means nothing to another machine", ip.Zone())
		}
		ip = ip.Unmap()
		kind, name = "ip6", ip.String()
		if ip.Is4() {
			kind = "ip4"
		}
	} else if !validName(name) {
		return nil, fmt.Errorf("%q is neither an IP address nor a host name", name)
	}
	return ma.NewMultiaddr("/" + kind + "/" + name + "/tcp/" + port)
}

func validName(name string) bool {
	if len(name) == 0 || len(name) > 253 {
		return false
	}
	for _, r := range name {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '-', r == '.', r == '_':
		default:
			return false
		}
	}
	return true
}

// listenAddrs turns "host:port" into the addresses to listen on. Without a host
// these are all IPv4 and all IPv6 addresses; the second may fail, where a
// machine has no IPv6.
func listenAddrs(s string) (must, may []ma.Multiaddr, err error) {
	name, port, err := net.SplitHostPort(s)
	if err != nil {
		return nil, nil, fmt.Errorf("listen address %q: %w", s, err)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return nil, nil, fmt.Errorf("listen address %q: the port is not a number from 0 to 65535", s)
	}
	if name == "" {
		v4, err := multiaddr("0.0.0.0", port)
		if err != nil {
			return nil, nil, fmt.Errorf("listen address %q: %w", s, err)
		}
		v6, err := multiaddr("::", port)
		if err != nil {
			return nil, nil, fmt.Errorf("listen address %q: %w", s, err)
		}
		return []ma.Multiaddr{v4}, []ma.Multiaddr{v6}, nil
	}
	if _, err := netip.ParseAddr(name); err != nil {
		return nil, nil, fmt.Errorf("listen address %q: %q is not an IP address of this machine (leave the host out to listen on all addresses)", s, name)
	}
	a, err := multiaddr(name, port)
	if err != nil {
		return nil, nil, fmt.Errorf("listen address %q: %w", s, err)
	}
	return []ma.Multiaddr{a}, nil, nil
}
