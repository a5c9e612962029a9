package exchange

import (
	"context"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
)

// kind of a request, for limits and metrics.
type kind int

const (
	demand kind = iota
	startup
	prefetch
	images
	documents
	profiles
	kinds
)

func (k kind) String() string {
	return [kinds]string{"demand", "startup", "prefetch", "image", "document", "profile"}[k]
}

// admission counts the requests that are worked on. What is over a limit is
// refused at once: the peer has others to ask, and a queue would only hide that
// from it.
type admission struct {
	perPeer, total [kinds]int
	pause          [kinds]time.Duration

	mu    sync.Mutex
	now   [kinds]int
	peers map[peer.ID]*peerLoad
}

// peerLoad is what one peer has under way.
type peerLoad struct {
	now [kinds]int
	// noDemand is closed when the last demand request ends; nil while there is
	// none.
	noDemand chan struct{}
}

func newAdmission(l *Limits) *admission {
	return &admission{
		perPeer: [kinds]int{l.DemandPerPeer, l.StartupPerPeer, l.PrefetchPerPeer, l.ImagesPerPeer, l.DocumentsPerPeer, 1},
		total:   [kinds]int{l.Demand, l.Startup, l.Prefetch, l.Waiting, l.Waiting, l.Profiles},
		pause:   [kinds]time.Duration{prefetch: l.DemandPause, startup: l.StartupPause},
		peers:   make(map[peer.ID]*peerLoad),
	}
}

// enter counts a request of p; false: a limit is reached.
func (a *admission) enter(p peer.ID, k kind) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	load := a.peers[p]
	if a.now[k] >= a.total[k] || (load != nil && load.now[k] >= a.perPeer[k]) {
		return false
	}
	if load == nil {
		load = &peerLoad{}
		a.peers[p] = load
	}
	a.now[k]++
	load.now[k]++
	if k == demand && load.noDemand == nil {
		load.noDemand = make(chan struct{})
	}
	return true
}

// leave ends what enter has counted.
func (a *admission) leave(p peer.ID, k kind) {
	a.mu.Lock()
	defer a.mu.Unlock()
	load := a.peers[p]
	a.now[k]--
	load.now[k]--
	if load.now[demand] == 0 && load.noDemand != nil {
		close(load.noDemand)
		load.noDemand = nil
	}
	if load.now == [kinds]int{} {
		delete(a.peers, p)
	}
}

// use returns the requests of a kind that are worked on, and their limit.
func (a *admission) use(k kind) blockdev.Use {
	a.mu.Lock()
	defer a.mu.Unlock()
	return blockdev.Use{Used: int64(a.now[k]), Capacity: int64(a.total[k])}
}

// waitForDemand lets demand requests of p go before the next chunk of a request
// of kind k: it returns when there are none, or after the kind's pause, so that a
// steady stream of them slows prefetch to a trickle and does not stop it.
func (a *admission) waitForDemand(ctx context.Context, p peer.ID, k kind) {
	a.mu.Lock()
	var ch chan struct{}
	if load := a.peers[p]; load != nil {
		ch = load.noDemand
	}
	a.mu.Unlock()
	if ch == nil {
		return
	}
	select {
	case <-ch:
	case <-time.After(a.pause[k]):
	case <-ctx.Done():
	}
}
