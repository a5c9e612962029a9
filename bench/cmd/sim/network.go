package main

import "time"

// network is machines with an uplink and a downlink each. A machine sends one
// chunk at a time, in the order in which they were queued, demand first; a chunk
// takes both links for its size over their rates, and arrives in the order in
// which chunks for that machine were sent. Requests, and answers without a chunk,
// take a latency and no bandwidth.
type network struct {
	now   int64
	queue queue

	hosts   []host
	chunk   int64            // bytes
	latency [2]time.Duration // one way: within a zone, between zones

	sends []send // pool of queued sends
	free  int32
}

type host struct {
	up, down int64 // nanoseconds that a chunk takes
	zone     uint8
	dead     bool
	silent   bool // nobody was told
	sending  bool
	downFree int64   // when the downlink has taken all that was sent so far
	queues   [2]lane // prefetch, demand
	sent     int64   // chunks
	crossed  int64   // chunks received from another zone
	chunks   int64   // chunks received
}

type lane struct {
	head, tail int32 // of sends, -1: none
}

type send struct {
	to, chunk int32
	next      int32
}

// Kinds of events. Those from userEvent on belong to whoever uses the network.
const (
	uplinkFree = iota // a: host
	arrival           // a: to, b: chunk, c: from
	userEvent
)

func newNetwork(chunk int64, latency [2]time.Duration) *network {
	return &network{chunk: chunk, latency: latency, free: -1}
}

// addHost adds a machine; rates are in bits per second.
func (n *network) addHost(zone int, up, down float64) int {
	perChunk := func(rate float64) int64 { return int64(float64(8*n.chunk) / rate * 1e9) }
	none := lane{head: -1, tail: -1}
	n.hosts = append(n.hosts, host{up: perChunk(up), down: perChunk(down), zone: uint8(zone), queues: [2]lane{none, none}})
	return len(n.hosts) - 1
}

func (n *network) delay(a, b int32) int64 {
	if n.hosts[a].zone != n.hosts[b].zone {
		return int64(n.latency[1])
	}
	return int64(n.latency[0])
}

// after makes an event.
func (n *network) after(d int64, kind uint8, a, b, c int32) {
	n.queue.push(event{at: n.now + d, kind: kind, a: a, b: b, c: c})
}

// send queues a chunk.
func (n *network) send(from, to, chunk int32, demand bool) {
	h := &n.hosts[from]
	if h.dead {
		return
	}
	i := n.free
	if i >= 0 {
		n.free = n.sends[i].next
	} else {
		i = int32(len(n.sends))
		n.sends = append(n.sends, send{})
	}
	n.sends[i] = send{to: to, chunk: chunk, next: -1}
	l := &h.queues[0]
	if demand {
		l = &h.queues[1]
	}
	if l.tail >= 0 {
		n.sends[l.tail].next = i
	} else {
		l.head = i
	}
	l.tail = i
	if !h.sending {
		n.transmit(from)
	}
}

// transmit sends the next chunk of the queue.
func (n *network) transmit(from int32) {
	h := &n.hosts[from]
	h.sending = false
	for l := 1; l >= 0 && !h.sending; l-- {
		q := &h.queues[l]
		for q.head >= 0 && !h.sending {
			i := q.head
			s := n.sends[i]
			if q.head = s.next; q.head < 0 {
				q.tail = -1
			}
			n.sends[i].next, n.free = n.free, i
			if h.dead || n.hosts[s.to].dead {
				continue
			}
			h.sending = true
			h.sent++
			n.after(h.up, uplinkFree, from, 0, 0)
			to := &n.hosts[s.to]
			first := n.now + n.delay(from, s.to)
			to.downFree = max(first+max(h.up, to.down), to.downFree+to.down)
			n.queue.push(event{at: to.downFree, kind: arrival, a: s.to, b: s.chunk, c: from})
		}
	}
}

// next takes the next event and deals with it if it is the network's own.
// It returns false if nothing happens any more.
func (n *network) next() (event, bool) {
	for len(n.queue.heap) > 0 {
		e := n.queue.pop()
		n.now = e.at
		switch e.kind {
		case uplinkFree:
			n.transmit(e.a)
			continue
		case arrival:
			to := &n.hosts[e.a]
			if to.dead || n.hosts[e.c].dead {
				continue
			}
			to.chunks++
			if to.zone != n.hosts[e.c].zone {
				to.crossed++
			}
		}
		return e, true
	}
	return event{}, false
}
