package policy

import (
	"net"
	"net/netip"
	"strings"
)

// LocalHost says whether a registry host, with or without a port, is a name that
// means something on this machine alone: loopback, and names without a dot, which
// come from this machine's own /etc/hosts or search list. Another machine may know
// another registry by that name.
func LocalHost(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.ToLower(strings.TrimSuffix(strings.Trim(name, "[]"), "."))
	if addr, err := netip.ParseAddr(name); err == nil {
		addr = addr.Unmap()
		return addr.IsLoopback() || addr.IsUnspecified()
	}
	return !strings.Contains(name, ".") || strings.HasSuffix(name, ".localhost") || name == "localhost.localdomain"
}
