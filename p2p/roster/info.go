package roster

import (
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/p2p/roster/cells"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Info describes a member to operators.
type Info struct {
	ID string
	// Address is where its connection comes from.
	Address string
	// Announced is where others dial it, IP:port; none: it shares nothing.
	Announced  []string
	Zone, Rack string
	// MaxUpload is in bytes per second; 0: no limit.
	MaxUpload int64
	// Images is how many groups it is in.
	Images int
	// Seconds is for how long it has been a member.
	Seconds int64
	// Lost: it has no connection, and its lease runs out.
	Lost bool
	// Revoked: it is no member, and is not let in.
	Revoked bool
}

func announced(m *cells.Member) []string {
	var out []string
	for _, b := range m.Message().Addrs {
		if ap, err := wire.ParseAddr(b); err == nil { // dialable has made it
			out = append(out, ap.String())
		}
	}
	return out
}

// Members lists all members, and the revoked nodes.
func (l *List) Members() []Info {
	l.mu.Lock()
	out := make([]Info, 0, len(l.members))
	ids, as := make([]peer.ID, 0, len(l.members)), make([]*cells.Member, 0, len(l.members))
	for _, m := range l.members {
		ids, as = append(ids, m.id), append(as, m.as)
		out = append(out, Info{
			Address: m.remote, Zone: m.zone, Rack: m.rack, MaxUpload: int64(m.upload),
			Images: len(m.groups), Seconds: int64(time.Since(m.joined).Seconds()), Lost: m.session == nil,
		})
	}
	l.mu.Unlock()
	for i, id := range ids { // 10,000 of them take a while to write
		out[i].ID, out[i].Announced = id.String(), announced(as[i])
	}
	for _, id := range l.revoked.list() {
		out = append(out, Info{ID: id.String(), Revoked: true})
	}
	slices.SortFunc(out, func(a, b Info) int {
		return strings.Compare(a.Zone+"\x00"+a.Rack+"\x00"+a.ID, b.Zone+"\x00"+b.Rack+"\x00"+b.ID)
	})
	return out
}
