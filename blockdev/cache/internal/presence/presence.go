package presence

import (
	"io"
	"math/bits"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

// persistBatch is how many neighbouring records one write takes at most.
const persistBatch = 64

// Chunks is what is known of a diff's chunks, in memory, and its copy in the
// bitmap file. present is read without the lock. Everything is changed under mu,
// so that a record, which is put together under mu, never mixes two states. mu
// is never held across I/O.
type Chunks struct {
	n       int
	codec   recordCodec
	length  func(i int) int // bytes of chunk i
	present Bitset
	synced  Bitset

	mu      sync.Mutex
	suspect Bitset
	checked Bitset // present, and written or checked by this process
	syncing Bitset // was present when the sync under way began

	dirty   Bitset // by record number: memory and file differ
	writing bool   // somebody writes records; it takes what turns dirty along
	written *sync.Cond
	buf     [persistBatch * recordSize]byte // of the one that writes

	nPresent      int
	bytesPresent  int64
	bytesUnsynced int64
}

// New is for a diff of n chunks, of which length says how many bytes each has.
func New(id blockdev.Digest, n int, length func(i int) int) *Chunks {
	p := &Chunks{
		n:       n,
		codec:   newRecordCodec(id),
		length:  length,
		present: NewBitset(n),
		synced:  NewBitset(n),
		suspect: NewBitset(n),
		checked: NewBitset(n),
		syncing: NewBitset(n),
		dirty:   NewBitset(records(n)),
	}
	p.written = sync.NewCond(&p.mu)
	return p
}

// Has reports whether chunk i is present.
func (p *Chunks) Has(i int) bool { return p.present.Get(i) }

// HasAll reports whether the chunks [lo, hi) are present.
func (p *Chunks) HasAll(lo, hi int) bool { return p.present.All(lo, hi) }

// SyncedAll reports whether the chunks [lo, hi) are synced.
func (p *Chunks) SyncedAll(lo, hi int) bool { return p.synced.All(lo, hi) }

// NextMissing is the first chunk from i on that is not present, or n.
func (p *Chunks) NextMissing(i int) int { return p.present.nextClear(i, p.n) }

// Belief is what of a bitmap file is believed.
type Belief uint8

const (
	// BelieveNone: what is present is looked at again before it is used.
	BelieveNone Belief = iota
	// BelieveSynced: so is what is present and not synced.
	BelieveSynced
	// BelievePresent: the page cache has all that was written since.
	BelievePresent
)

// Load takes over what the records of a bitmap file say. It returns how many present chunks were
// not believed.
func (p *Chunks) Load(file []byte, b Belief) (doubted int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for g := range records(p.n) {
		valid := ^uint32(0)
		if rest := p.n - g*perRecord; rest < perRecord {
			valid = 1<<rest - 1
		}
		r, ok := p.codec.get(file[g*recordSize:], g)
		if !ok {
			r = record{suspect: valid}
			doubted += bits.OnesCount32(valid)
			p.dirty.Set(g)
		}
		var drop uint32
		switch b {
		case BelieveNone:
			drop = r.present
		case BelieveSynced:
			drop = r.present &^ r.synced
		case BelievePresent:
		}
		if drop != 0 {
			r.present &^= drop
			r.suspect |= drop
			doubted += bits.OnesCount32(drop)
			p.dirty.Set(g)
		}
		r.present &= valid
		r.synced &= r.present
		r.suspect &= valid &^ r.present
		p.present[g].Store(r.present)
		p.synced[g].Store(r.synced)
		p.suspect[g].Store(r.suspect)
		for w := r.present; w != 0; w &= w - 1 {
			i := g*perRecord + bits.TrailingZeros32(w)
			p.nPresent++
			p.bytesPresent += int64(p.length(i))
			if !p.synced.Get(i) {
				p.bytesUnsynced += int64(p.length(i))
			}
		}
	}
	return doubted
}

// DoubtAll makes every chunk suspect: nothing that is on disk is believed.
func (p *Chunks) DoubtAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.n {
		p.suspect.Set(i)
		p.dirty.Set(i / perRecord)
	}
}

// Add says that chunk i is in the data file and was checked. It returns the
// bytes that are present and not synced.
func (p *Chunks) Add(i int) (unsynced int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.suspect.unset(i)
	p.checked.Set(i)
	if !p.present.Get(i) {
		p.nPresent++
		p.bytesPresent += int64(p.length(i))
		p.bytesUnsynced += int64(p.length(i))
		p.present.Set(i)
	}
	p.dirty.Set(i / perRecord)
	return p.bytesUnsynced
}

// Check says that chunk i, which is present, has been read back and was right.
func (p *Chunks) Check(i int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.present.Get(i) {
		p.checked.Set(i)
	}
}

// Drop says that chunk i is not in the data file, or not right. It reports
// whether it was thought present.
func (p *Chunks) Drop(i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.remove(i)
}

func (p *Chunks) IsSuspect(i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.suspect.Get(i)
}

// remove takes chunk i out of all sets; mu is held.
func (p *Chunks) remove(i int) bool {
	was := p.present.Get(i)
	if was {
		p.nPresent--
		p.bytesPresent -= int64(p.length(i))
		if !p.synced.Get(i) {
			p.bytesUnsynced -= int64(p.length(i))
		}
	}
	p.present.unset(i)
	p.synced.unset(i)
	p.checked.unset(i)
	p.syncing.unset(i)
	p.suspect.unset(i)
	p.dirty.Set(i / perRecord)
	return was
}

// BeginSync notes what is present and not synced; after an fdatasync, EndSync
// declares that synced. One sync at a time. It reports whether there is any.
func (p *Chunks) BeginSync() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	var anything bool
	for g := range p.syncing {
		w := p.present[g].Load() &^ p.synced[g].Load()
		p.syncing[g].Store(w)
		anything = anything || w != 0
	}
	return anything
}

// EndSync ends what BeginSync began. ok: the data is on stable storage.
// Otherwise what was to be synced is missing, and not suspect: after a failed
// write-back the kernel may keep pages that look right, call them clean, and
// never write them. A chunk that was dropped in between is in neither set. It
// returns the ranges of chunks that are synced now and were not before.
func (p *Chunks) EndSync(ok bool) (ranges [][2]int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := p.syncing.nextSet(0, p.n); i < p.n; {
		end := p.syncing.nextClear(i, p.n)
		for k := i; k < end; k++ {
			if !ok {
				p.remove(k)
				continue
			}
			p.bytesUnsynced -= int64(p.length(k))
			p.synced.Set(k)
			p.dirty.Set(k / perRecord)
		}
		ranges = append(ranges, [2]int{i, end})
		i = p.syncing.nextSet(end, p.n)
	}
	for g := range p.syncing {
		p.syncing[g].Store(0)
	}
	return ranges
}

// Persist writes what differs to the bitmap file. If another goroutine is writing,
// that one takes our changes along; with wait, persist returns after it has.
func (p *Chunks) Persist(w io.WriterAt, wait bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.writing {
		if !wait {
			return nil
		}
		p.written.Wait()
	}
	p.writing = true
	defer func() {
		p.writing = false
		p.written.Broadcast()
	}()
	for g := p.dirty.nextSet(0, records(p.n)); g < records(p.n); g = p.dirty.nextSet(0, records(p.n)) {
		end := min(p.dirty.nextClear(g, records(p.n)), g+persistBatch)
		for k := g; k < end; k++ {
			p.codec.put(p.buf[(k-g)*recordSize:], k, record{p.present[k].Load(), p.synced[k].Load(), p.suspect[k].Load()})
			p.dirty.unset(k)
		}
		p.mu.Unlock()
		_, err := w.WriteAt(p.buf[:(end-g)*recordSize], HeaderSize+int64(g)*recordSize)
		p.mu.Lock()
		if err != nil {
			for k := g; k < end; k++ {
				p.dirty.Set(k)
			}
			return err
		}
	}
	return nil
}

// Soil has every record written again.
func (p *Chunks) Soil() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for g := range records(p.n) {
		p.dirty.Set(g)
	}
}

// Counts returns the chunks and bytes that are present, and the bytes of these
// that are not synced.
func (p *Chunks) Counts() (chunks int, bytes, unsynced int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nPresent, p.bytesPresent, p.bytesUnsynced
}

// Full reports whether every chunk is present, synced and checked.
func (p *Chunks) Full() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.synced.All(0, p.n) && p.checked.All(0, p.n)
}

// NextUnchecked is the first chunk from i on that is present but has not been
// checked by this process; n if there is none.
func (p *Chunks) NextUnchecked(i int) int {
	for i = p.checked.nextClear(i, p.n); i < p.n; i = p.checked.nextClear(i+1, p.n) {
		if p.present.Get(i) {
			return i
		}
	}
	return p.n
}
