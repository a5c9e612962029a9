package route

import (
	"math/bits"
	"time"
)

// Bounds on how long a node waits for a peer.
const (
	hedgeFirst = 30 * time.Millisecond // before anything was learned
	hedgeLeast = 2 * time.Millisecond
	hedgeMost  = 100 * time.Millisecond

	demandLeast   = 20 * time.Millisecond
	demandMost    = 150 * time.Millisecond // as long as nearly all answers come sooner
	demandLast    = 2 * time.Second        // however slow they are
	prefetchFirst = 5 * time.Second        // before anything was learned
	prefetchLeast = 2 * time.Second
	prefetchMost  = 15 * time.Second

	// hedgeBurst is how many bytes of hedges may be ahead of their budget: four
	// of the longest chunks.
	hedgeBurst = 1 << 20
)

// Patience says how long to wait for a peer that does not answer: after hedge a
// second request goes to another peer, if Hedge allows it (0: never, as for
// prefetches); after giveUp the first one is cancelled and reported as Slow.
// Before that, nothing has been lost: a live peer may have to get the chunk from
// its own parent first.
func (b *Book) Patience(demand bool) (hedge, giveUp time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !demand {
		p := b.prefetch.p95()
		if p == 0 {
			return 0, prefetchFirst
		}
		return 0, min(max(4*p, prefetchLeast), prefetchMost)
	}
	hedge = hedgeFirst
	p := b.demand.p95()
	if p > 0 {
		hedge = min(max(p, hedgeLeast), hedgeMost)
	}
	giveUp = min(max(4*hedge, demandLeast), demandMost)
	if p > hedgeMost {
		// All answers take long: links are full, and giving up what is on its way
		// only fills them with what nobody takes.
		hedge = min(p, demandLast/2)
		giveUp = min(max(3*p/2, giveUp), demandLast)
	}
	return hedge, giveUp
}

// Hedge says whether a demand read of so many bytes may be asked for twice, and
// takes them out of the budget if so.
func (b *Book) Hedge(bytes int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.budget.credit < float64(bytes) {
		return false
	}
	b.budget.credit -= float64(bytes)
	return true
}

// budget lets hedges cost a share of the bytes of demand reads.
type budget struct {
	share, credit float64
}

func (b *budget) earn(bytes int) {
	b.credit = min(b.credit+b.share*float64(bytes), hedgeBurst)
}

// memory is after how many answers those before count half: enough to know a
// 95th percentile, few enough to forget a full link soon.
const memory = 512

// latencies is a histogram of answers, four buckets for each doubling from 16 us
// on, in which older ones count less.
type latencies struct {
	count [80]uint16
	total int
	fresh int // since last
	last  time.Duration
}

func bucket(d time.Duration) int {
	u := uint64(max(d, 0)) >> 12 // of 4 us
	if u < 4 {
		return int(u)
	}
	n := bits.Len64(u) // 3 and more
	return min(4*(n-2)+int(u>>(n-3)&3), len(latencies{}.count)-1)
}

// upper is the upper end of bucket i.
func upper(i int) time.Duration {
	i++
	if i < 4 {
		return time.Duration(i) << 12
	}
	return time.Duration(4+i%4) << (12 + i/4 - 1)
}

func (l *latencies) add(d time.Duration) {
	l.count[bucket(d)]++
	l.fresh++
	if l.total++; l.total >= memory {
		l.total = 0
		for i := range l.count {
			l.count[i] /= 2
			l.total += int(l.count[i])
		}
	}
}

// p95 returns the learned 95th percentile, rounded up by a fifth at most; 0
// before there are twenty answers.
func (l *latencies) p95() time.Duration {
	if l.fresh == 0 || l.last != 0 && l.fresh < 16 {
		return l.last
	}
	if l.total < 20 {
		return 0
	}
	l.fresh = 0
	left := l.total / 20
	for i := len(l.count) - 1; i >= 0; i-- {
		if left -= int(l.count[i]); left < 0 {
			l.last = upper(i)
			break
		}
	}
	return l.last
}
