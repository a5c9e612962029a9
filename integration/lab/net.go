package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Net is a network of machines: one network namespace for each, and one for the
// switches, a bridge for each zone. Zones are joined in a row by uplinks. It is
// reached from nowhere else.
type Net struct {
	// IPv4 and IPv6 say which addresses machines get that are added from now on; NewNet
	// sets the first.
	IPv4, IPv6 bool

	lab   *Lab
	sw    string // the switches' namespace
	zones int
	hosts int
}

// Host is a machine of a Net, with an address and a link of its own. What is
// started at it (Lab.At) shares this machine's files and processor, and nothing
// of its network.
type Host struct {
	Name string
	// IP is its address in the Net: the IPv4 one, if it has one; IP6 is the IPv6 one, or
	// empty.
	IP, IP6 string
	// Zone counts from 0.
	Zone int

	net  *Net
	ns   string // its namespace
	port string // the other end of its link
	http *http.Client
	box  *os.File // the first process of its Box; nil: it is none
}

// NewNet makes a network of zones without hosts.
func (l *Lab) NewNet(ctx context.Context, zones int) (*Net, error) {
	n := &Net{IPv4: true, lab: l, sw: filepath.Base(l.Dir) + "-sw", zones: zones}
	if err := n.ip(ctx, "netns", "add", n.sw); err != nil {
		return nil, err
	}
	l.OnClose(func() error { return n.ip(context.Background(), "netns", "del", n.sw) })
	for z := range zones {
		if err := n.ip(ctx, "-n", n.sw, "link", "add", "zone"+strconv.Itoa(z), "up", "type", "bridge"); err != nil {
			return nil, err
		}
		if z == 0 {
			continue
		}
		left, right := uplink(z)
		for _, args := range [][]string{
			{"link", "add", left, "up", "type", "veth", "peer", "name", right},
			{"link", "set", left, "master", "zone" + strconv.Itoa(z-1)},
			{"link", "set", right, "up", "master", "zone" + strconv.Itoa(z)},
		} {
			if err := n.ip(ctx, append([]string{"-n", n.sw}, args...)...); err != nil {
				return nil, err
			}
		}
	}
	return n, nil
}

// uplink names the two ends of the uplink between zones z-1 and z.
func uplink(z int) (left, right string) {
	return fmt.Sprintf("up%dl", z), fmt.Sprintf("up%dr", z)
}

func (n *Net) ip(ctx context.Context, args ...string) error {
	_, err := n.lab.Run(ctx, "ip", args...)
	return err
}

// congestionControl of the machines' TCP: Linux's own default, so that what is measured
// does not depend on what somebody has set on the machine that all of them run on.
const congestionControl = "cubic"

// NewHost adds a machine whose link has this rate in each direction (0: none).
func (n *Net) NewHost(ctx context.Context, name string, zone int, rate Rate) (*Host, error) {
	if zone < 0 || zone >= n.zones {
		return nil, fmt.Errorf("host %s: there is no zone %d", name, zone)
	}
	h, err := n.newHost(ctx, name, zone)
	if err != nil {
		return nil, err
	}
	if n.IPv4 {
		h.IP = fmt.Sprintf("10.77.%d.%d", n.hosts/250, n.hosts%250+1)
	}
	if n.IPv6 {
		h.IP6 = fmt.Sprintf("fd77::%x", n.hosts+1)
	}
	steps := [][]string{
		{"-n", h.ns, "link", "add", "eth0", "type", "veth", "peer", "name", h.port, "netns", n.sw},
		{"-n", h.ns, "link", "set", "eth0", "up"},
		{"-n", n.sw, "link", "set", h.port, "up", "master", "zone" + strconv.Itoa(zone)},
	}
	if h.IP != "" {
		steps = append(steps, []string{"-n", h.ns, "addr", "add", h.IP + "/16", "dev", "eth0"},
			// A route may say it where the sysctl may not.
			[]string{"-n", h.ns, "route", "replace", "10.77.0.0/16", "dev", "eth0", "src", h.IP, "congctl", congestionControl})
	}
	if h.IP6 != "" {
		steps = append(steps, []string{"-n", h.ns, "-6", "addr", "add", h.IP6 + "/64", "dev", "eth0", "nodad"})
	}
	if h.IP == "" {
		h.IP = h.IP6
	}
	for _, args := range steps {
		if err := n.ip(ctx, args...); err != nil {
			return nil, err
		}
	}
	if rate == 0 {
		return h, nil
	}
	return h, errors.Join(n.shape(ctx, h.ns, "eth0", rate), n.shape(ctx, n.sw, h.port, rate))
}

// newHost makes a machine that has no network yet.
func (n *Net) newHost(ctx context.Context, name string, zone int) (*Host, error) {
	n.hosts++
	h := &Host{Name: name, Zone: zone, net: n, ns: filepath.Base(n.lab.Dir) + "-" + name, port: "p" + strconv.Itoa(n.hosts)}
	transport := &http.Transport{DialContext: h.Dial}
	h.http = &http.Client{Transport: transport}
	if err := n.ip(ctx, "netns", "add", h.ns); err != nil {
		return nil, err
	}
	n.lab.OnClose(func() error {
		transport.CloseIdleConnections()
		return n.ip(context.Background(), "netns", "del", h.ns)
	})
	return h, n.ip(ctx, "-n", h.ns, "link", "set", "lo", "up")
}

// NewHostBehind adds a machine whose only way to the Net is address translation at
// another one (IPv4): it can dial everybody, and nobody can dial it.
func (n *Net) NewHostBehind(ctx context.Context, name string, router *Host) (*Host, error) {
	h, err := n.newHost(ctx, name, router.Zone)
	if err != nil {
		return nil, err
	}
	h.IP = fmt.Sprintf("192.168.%d.2", n.hosts)
	gateway := fmt.Sprintf("192.168.%d.1", n.hosts)
	for _, args := range [][]string{
		{"-n", h.ns, "link", "add", "eth0", "type", "veth", "peer", "name", h.port, "netns", router.ns},
		{"-n", h.ns, "addr", "add", h.IP + "/24", "dev", "eth0"},
		{"-n", h.ns, "link", "set", "eth0", "up"},
		{"-n", router.ns, "addr", "add", gateway + "/24", "dev", h.port},
		{"-n", router.ns, "link", "set", h.port, "up"},
		{"-n", h.ns, "route", "add", "default", "via", gateway},
	} {
		if err := n.ip(ctx, args...); err != nil {
			return nil, err
		}
	}
	if err := router.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) }); err != nil {
		return nil, err
	}
	return h, router.Run(ctx, "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
}

// SecondLink gives a machine another network card, with this address (and the length of
// its prefix), in a network that nobody else is in.
func (n *Net) SecondLink(ctx context.Context, h *Host, addr string) error {
	for _, args := range [][]string{
		{"-n", h.ns, "link", "add", "eth1", "type", "veth", "peer", "name", "second" + h.port, "netns", n.sw},
		{"-n", h.ns, "addr", "add", addr, "dev", "eth1"},
		{"-n", h.ns, "link", "set", "eth1", "up"},
		{"-n", n.sw, "link", "set", "second" + h.port, "up"},
	} {
		if err := n.ip(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// Run runs a program in the machine's network.
func (h *Host) Run(ctx context.Context, program string, args ...string) error {
	return h.net.ip(ctx, append([]string{"netns", "exec", h.ns, program}, args...)...)
}

// SetDropped has the machine's network drop all packets to and from it, without a word
// to anybody, or ends that.
func (h *Host) SetDropped(ctx context.Context, dropped bool) error {
	how := "-D"
	if dropped {
		how = "-I"
	}
	for _, program := range []string{"iptables", "ip6tables"} {
		for _, rule := range [][]string{{"INPUT", "-i"}, {"OUTPUT", "-o"}} {
			if err := h.Run(ctx, program, "-w", how, rule[0], rule[1], "eth0", "-j", "DROP"); err != nil {
				return err
			}
		}
	}
	return nil
}

// portBuffer is what a port of a small switch holds at least, in bytes. Slow links
// stand for fast ones here, but packets do not shrink with the rate: with a queue of
// 20 ms alone, which is 50 packets at 10 Mbit/s, eight senders to one machine have to
// send a quarter of all packets twice.
const portBuffer = 256 << 10

// shape limits what leaves a device. The burst is what a network card hands over
// in one piece (64 KiB) at least, and what its rate lets through in 2 ms; the queue
// behind it is 20 ms long, and portBuffer at least.
func (n *Net) shape(ctx context.Context, ns, dev string, rate Rate) error {
	burst := max(64<<10, int64(rate)/500)
	limit := burst + max(portBuffer, int64(rate)/50)
	_, err := n.lab.Run(ctx, "tc", "-n", ns, "qdisc", "add", "dev", dev, "root", "tbf",
		"rate", strconv.FormatInt(int64(rate)*8, 10)+"bit", "burst", strconv.FormatInt(burst, 10), "limit", strconv.FormatInt(limit, 10))
	return err
}

// Partition cuts the uplink between zones z-1 and z, or heals it.
func (n *Net) Partition(ctx context.Context, z int, cut bool) error {
	state := "up"
	if cut {
		state = "down"
	}
	left, _ := uplink(z)
	return n.ip(ctx, "-n", n.sw, "link", "set", left, state)
}

// Crossed returns the bytes that went over the uplink between zones z-1 and z
// since the start: towards z, and away from it.
func (n *Net) Crossed(z int) (into, out int64, err error) {
	_, right := uplink(z)
	return devBytes(n.sw, right)
}

// SetLink cuts the machine's link, or mends it.
func (h *Host) SetLink(ctx context.Context, up bool) error {
	state := "down"
	if up {
		state = "up"
	}
	return h.net.ip(ctx, "-n", h.net.sw, "link", "set", h.port, state)
}

// Bytes returns what the machine has received and sent since the start, all
// headers included.
func (h *Host) Bytes() (received, sent int64, err error) { return devBytes(h.ns, "eth0") }

// devBytes reads a device's counters.
func devBytes(ns, dev string) (received, sent int64, err error) {
	var b []byte
	if err := inNetns(ns, func() error {
		b, err = os.ReadFile("/proc/thread-self/net/dev")
		return err
	}); err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		name, counters, ok := strings.Cut(strings.TrimSpace(line), ":")
		if f := strings.Fields(counters); ok && name == dev && len(f) > 8 {
			received, err = strconv.ParseInt(f[0], 10, 64)
			if err == nil {
				sent, err = strconv.ParseInt(f[8], 10, 64)
			}
			return received, sent, err
		}
	}
	return 0, 0, fmt.Errorf("namespace %s has no device %s", ns, dev)
}

// Dial connects from the machine.
func (h *Host) Dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = h.do(func() error {
		// No resolver and no second goroutine: those would be in another namespace.
		c, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// At returns the lab as seen from a machine: what is started through it runs
// there, on that machine's address.
func (l *Lab) At(h *Host) *Lab {
	at := *l
	at.host = h
	return &at
}

// client is for HTTP requests from the lab's machine.
func (l *Lab) client() *http.Client {
	if l.host == nil {
		return http.DefaultClient
	}
	return l.host.http
}

// inHost runs f, which must not hand its work to another goroutine, on the lab's
// machine.
func (l *Lab) inHost(f func() error) error {
	if l.host == nil {
		return f()
	}
	return l.host.do(f)
}

func (h *Host) do(f func() error) error {
	if h.box != nil {
		return inBox(h.box, f)
	}
	return inNetns(h.ns, f)
}

// inNetns runs f on a thread that is in a network namespace, and lets the thread
// end with it.
func inNetns(name string, f func() error) error {
	ns, err := os.Open(filepath.Join("/run/netns", name))
	if err != nil {
		return err
	}
	defer ns.Close()
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", name, err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own, which ends with it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The first thread does not end with a goroutine, and what it has entered is
			// what /proc/self shows. While it is held here, f runs on another.
			defer runtime.UnlockOSThread()
			done <- onThread(f)
			return
		}
		done <- f()
	}()
	return <-done
}
