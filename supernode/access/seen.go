package access

import (
	"encoding/binary"
	"slices"
	"time"
)

const (
	// maxAccesses bounds the accesses of peers that are kept: 10,000 nodes with 100
	// private repositories each. maxPublic bounds those of everybody.
	maxAccesses = 1 << 20
	maxPublic   = 1 << 16
	// maxGroup bounds a group.
	maxGroup = 1 << 12
	// groupCost is what a group takes beside its accesses, in accesses.
	groupCost = 4

	hostSize   = 4
	recordSize = len(accessID{}) + 4
)

// groupID names those that share a bound: a peer, or for what is public, a registry host.
type groupID [16]byte

// accessID names a repository and a credential. It begins with the registry host's hash.
type accessID [16]byte

func (a *accessID) host() uint32 { return binary.BigEndian.Uint32(a[:hostSize]) }

// accessKey is an access of a group.
type accessKey struct {
	group groupID
	id    accessID
}

// given is when there was an access last, in Unix seconds.
type given struct {
	id accessID
	at uint32
}

// seen is when there were accesses. What makes room for a new one are the oldest of the
// registry host that has most of
//
//   - the group, if that has maxGroup, so that one registry that says yes to everything
//     pushes out its own;
//   - a group that has no less than the average, if there are max in all, so that a peer that
//     asks for everything pushes out its own.
//
// Names of registry hosts cost their owner nothing, and identities of peers something: so the
// groups are peers, where there is one.
//
// A group is a slice, with the newest access at its end: that takes a tenth of the memory of
// a map with a list, and a group is small. On disk it is one record.
type seen struct {
	max          int
	grace, fresh time.Duration // how long an access counts, and is not written again

	groups  map[groupID][]given
	n       int // accesses in all groups
	changed map[groupID]bool
}

func newSeen(limit int, cfg Config) *seen {
	return &seen{max: limit, grace: cfg.Grace, fresh: cfg.TTL, groups: map[groupID][]given{}, changed: map[groupID]bool{}}
}

// counts says whether an earlier access still counts while the registry is down.
func (s *seen) counts(g given, now time.Time) bool {
	at := int64(g.at)
	return at > now.Add(-s.grace).Unix() && at <= now.Add(time.Minute).Unix()
}

// before says whether there was an access that still counts.
func (s *seen) before(k accessKey, now time.Time) bool {
	g := s.groups[k.group]
	i := find(g, k.id)
	return i >= 0 && s.counts(g[i], now)
}

// note says that there is an access now.
func (s *seen) note(k accessKey, now time.Time) {
	if g := s.groups[k.group]; len(g) > 0 {
		if i := find(g, k.id); i >= 0 {
			if age := now.Sub(time.Unix(int64(g[i].at), 0)); age >= 0 && age < s.fresh {
				return // spares the disk
			}
			s.set(k.group, slices.Delete(g, i, i+1))
		} else if len(g) >= maxGroup {
			s.set(k.group, withoutOldest(g))
		}
	}
	for s.n+groupCost*len(s.groups) >= s.max && s.n > 0 {
		s.makeRoom()
	}
	s.set(k.group, append(s.groups[k.group], given{k.id, uint32(now.Unix())}))
}

// forget takes an access back.
func (s *seen) forget(k accessKey) {
	g := s.groups[k.group]
	if i := find(g, k.id); i >= 0 {
		s.set(k.group, slices.Delete(g, i, i+1))
	}
}

// sweep forgets what does not count any more, from the oldest of each group on. It looks at
// few of them, since others wait for it.
func (s *seen) sweep(now time.Time) {
	for id, g := range s.groups {
		old := 0
		for old < len(g) && !s.counts(g[old], now) {
			old++
		}
		if old > 0 {
			s.set(id, slices.Delete(g, 0, old))
		}
	}
}

// makeRoom forgets accesses of one group. The order of a map is random, so that groups of the same
// size lose as much.
func (s *seen) makeRoom() {
	average := s.n / len(s.groups)
	for id, g := range s.groups {
		if len(g) >= average {
			s.set(id, withoutOldest(g))
			return
		}
	}
}

// set replaces a group, which may share its array with what it was.
func (s *seen) set(id groupID, g []given) {
	s.n += len(g) - len(s.groups[id])
	s.changed[id] = true
	if len(g) == 0 {
		delete(s.groups, id)
		return
	}
	if cap(g) > 2*len(g)+16 {
		g = slices.Clone(g) // gives memory back
	}
	s.groups[id] = g
}

func find(g []given, id accessID) int {
	for i := range g {
		if g[i].id == id {
			return i
		}
	}
	return -1
}

// withoutOldest takes out the oldest accesses of the registry host that has most of them: a
// sixteenth of g, since it looks at all of g, and at least one.
func withoutOldest(g []given) []given {
	count := map[uint32]int{}
	var most uint32
	for i := range g {
		h := g[i].id.host()
		if count[h]++; count[h] > count[most] {
			most = h
		}
	}
	n := min(1+len(g)/16, count[most])
	return slices.DeleteFunc(g, func(x given) bool {
		if n == 0 || x.id.host() != most {
			return false
		}
		n--
		return true
	})
}

// changes are the groups that changed since the last call, as they are on disk; empty: gone.
func (s *seen) changes() map[groupID][]byte {
	all := make(map[groupID][]byte, len(s.changed))
	for id := range s.changed {
		g := s.groups[id]
		b := make([]byte, 0, len(g)*recordSize)
		for _, x := range g {
			b = binary.BigEndian.AppendUint32(append(b, x.id[:]...), x.at)
		}
		all[id] = b
	}
	s.changed = map[groupID]bool{}
	return all
}

// unwritten has groups be among the next changes, too.
func (s *seen) unwritten(changes map[groupID][]byte) {
	for id := range changes {
		s.changed[id] = true
	}
}

// load takes a group from disk. If it is not one, the result is false.
func (s *seen) load(id, b []byte) bool {
	n := len(b) / recordSize
	if len(id) != len(groupID{}) || len(b)%recordSize != 0 || n == 0 || n > maxGroup {
		return false
	}
	g := make([]given, n)
	for i := range g {
		r := b[i*recordSize:]
		g[i] = given{accessID(r), binary.BigEndian.Uint32(r[len(accessID{}):])}
	}
	s.groups[groupID(id)] = g
	s.n += n
	return true
}
