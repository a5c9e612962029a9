package integration

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// longest reads the files one after the other, and returns the time that the longest
// read took.
func longest(t *testing.T, d *tally, dir string, files map[string]string, from, to int) time.Duration {
	t.Helper()
	var most time.Duration
	for i := from; i < to; i++ {
		name := fmt.Sprintf("a/%03d", i)
		began := time.Now()
		d.file(filepath.Join(dir, name), files[name])
		most = max(most, time.Since(began))
	}
	return most
}

// TestDrillDropped has a network drop the packets of a machine, which nobody is told of, and
// measures what that costs those who would ask this machine.
func TestDrillDropped(t *testing.T) {
	d := &tally{drill: "packets are dropped", rounds: min(rounds(t, 1), 3)}
	var c costs
	for i := range d.rounds {
		t.Run(fmt.Sprint("peer", i), func(t *testing.T) { droppedPeer(t, d, &c) })
		t.Run(fmt.Sprint("supernode", i), func(t *testing.T) { droppedSupernode(t, d, &c) })
	}
	d.rows(t)
	for _, c := range c.rows {
		cmp := report.AtMost
		if c.bar == 0 {
			cmp = ""
		}
		figure(t, c.name, "s", cmp, c.bar, c.samples...)
	}
}

// costs are the samples of all rounds, by row.
type costs struct{ rows []*cost }

type cost struct {
	name    string
	bar     float64 // 0: none
	samples []float64
}

func (c *costs) add(name string, bar float64, took time.Duration) {
	i := slices.IndexFunc(c.rows, func(r *cost) bool { return r.name == name })
	if i < 0 {
		i = len(c.rows)
		c.rows = append(c.rows, &cost{name: name, bar: bar})
	}
	c.rows[i].samples = append(c.rows[i].samples, took.Seconds())
}

// What the first read or pull may cost beyond what it costs without, and those after it,
// by when it is known.
const once, known = 1, 0.2

// lazily is the config of a node that fetches what is read, and no more.
var lazily = map[string]string{"prefetch": `"none"`}

func droppedPeer(t *testing.T, d *tally, c *costs) {
	ctx := t.Context()
	w := newOwnNet(t, true, false, nil)
	part := 60
	if isDrill() {
		part = 200 // more than there are bytes for asking twice
	}
	im, files := w.image(t, "read", 4*part, w.super.Control)
	super := []string{w.super.At(w.at.IP)}
	hosts := map[string]*lab.Host{}
	start := func(name string, set map[string]string) *lab.Node {
		t.Helper()
		hosts[name] = must(w.net.NewHost(ctx, name, 0, 0))(t)
		return must(w.At(hosts[name]).StartDefaultNode(ctx, name, super, set))(t)
	}
	for i := range 3 {
		n := start(fmt.Sprint("n", i), map[string]string{"prefetch_rate": `"0B"`})
		w.view(t, n, im)
		noError(t, n.WaitLocal(ctx, im.Ref, 120*time.Second))
	}
	reader := w.view(t, start("reader", lazily), im)
	fresh := w.view(t, start("fresh", lazily), im) // has asked nobody for chunks yet
	w.announced(t, 5)

	without := longest(t, d, reader, files, 0, part)
	noError(t, hosts["n1"].SetDropped(ctx, true))
	first := longest(t, d, reader, files, part, 2*part)
	second := longest(t, d, reader, files, 2*part, 3*part)
	unconnected := longest(t, d, fresh, files, 0, part)
	c.add("a peer drops packets: longest read without", 0, without)
	c.add("a peer drops packets: longest read beyond without, first time", once, first-without)
	c.add("a peer drops packets: longest read beyond without, second time", known, second-without)
	c.add("a peer drops packets: longest read beyond without, by a node that was not connected to it", once, unconnected-without)
	if isDrill() {
		wait(ctx, 20*time.Second) // silent connections are broken by now, and the peer is off the list
		later := longest(t, d, reader, files, 3*part, 4*part)
		c.add("a peer drops packets: longest read beyond without, when it is off the list", known, later-without)
	}
	noError(t, hosts["n1"].SetDropped(ctx, false))
	w.announced(t, 5)
}

func droppedSupernode(t *testing.T, d *tally, c *costs) {
	ctx := t.Context()
	l := newLab(t)
	net := must(l.NewNet(ctx, 1))(t)
	w := &ownNet{Lab: l, net: net, at: must(net.NewHost(ctx, "registry", 0, 0))(t)}
	w.registry = must(l.At(w.at).StartRegistry(ctx, "registry", l.Path("images"), ""))(t)
	set := map[string]string{"config_path": strconv.Quote(w.certs(t))}
	var hosts []*lab.Host
	var supers []*lab.Supernode
	var addrs []string
	for i := range 2 {
		h := must(net.NewHost(ctx, fmt.Sprint("super", i), 0, 0))(t)
		s := must(l.At(h).StartDefaultSupernode(ctx, fmt.Sprint("super", i), set))(t)
		hosts, addrs = append(hosts, h), append(addrs, s.At(h.IP))
		noError(t, s.Stop())
	}
	set["siblings"] = fmt.Sprintf("[%q, %q]", addrs[0], addrs[1])
	for i, h := range hosts {
		supers = append(supers, must(l.At(h).StartDefaultSupernode(ctx, fmt.Sprint("super", i), set))(t))
	}
	h := must(net.NewHost(ctx, "node", 0, 0))(t)
	node := must(l.At(h).StartDefaultNode(ctx, "node", addrs, lazily))(t)
	// Whose image an image is depends on its digest: of four, one is very probably of the
	// supernode that drops packets.
	const part = 4
	var images []*lab.Image
	var files []map[string]string
	for i := range 3 * part {
		im, in := w.image(t, fmt.Sprint("image", i), 3, supers[0].Control)
		must(l.Run(ctx, "shoal", "prefetch", "--control", supers[1].Control, im.Ref))(t)
		images, files = append(images, im), append(files, in)
	}
	pulls := func(from int) (most time.Duration) {
		for i := from; i < from+part; i++ {
			began := time.Now()
			noError(t, node.Pull(ctx, images[i]))
			most = max(most, time.Since(began))
		}
		return most
	}
	without := pulls(0)
	noError(t, hosts[0].SetDropped(ctx, true))
	first := pulls(part)
	second := pulls(2 * part)
	var reads time.Duration
	for i := range images {
		reads = max(reads, longest(t, d, w.view(t, node, images[i]), files[i], 0, 3))
	}
	noError(t, hosts[0].SetDropped(ctx, false))
	c.add("a supernode drops packets: pull without", 0, without)
	c.add("a supernode drops packets: pull beyond without", once, first-without)
	c.add("a supernode drops packets: pull beyond without, second time", known, second-without)
	c.add("a supernode drops packets: longest read", 0, reads)
}
