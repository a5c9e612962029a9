package wire

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
)

// Limits of the membership protocol, in bytes unless said otherwise.
const (
	// MaxToken is the longest token, and MaxLabel the longest zone or rack.
	MaxToken = 1 << 10
	MaxLabel = 64
	// InstanceLen is the length of Hello.instance.
	InstanceLen = 16
	// MaxAddrs is how many addresses a peer may have.
	MaxAddrs = 8
	// MaxGrant is the longest grant.
	MaxGrant = 256
	// MaxWho is how many peers one Who may ask for.
	MaxWho = 64
	// MaxGateways is how many gateways a cell may have.
	MaxGateways = 8
	// MaxHaveCells is how many cells a GroupHave may name: what supernodes of an
	// earlier version take as part of a request that they do not know.
	MaxHaveCells = 160
	// MaxGroups is how many groups one node may be in.
	MaxGroups = 4096

	// MaxMemberRequest and MaxMemberEvent bound the messages of these names.
	// The latter has room for 8,000 members with an address each, several times
	// what a node gets of one group.
	MaxMemberRequest = MaxToken + MaxWho*KeyLen + slack
	MaxMemberEvent   = 1 << 20

	// KeyLen is the length of a peer's key.
	KeyLen = 32
)

// Key is a peer's Ed25519 public key.
type Key = [KeyLen]byte

// ParseMemberRequest reads and checks a MemberRequest. A part that this version
// does not know gives a request without part, to be skipped. Errors wrap
// blockdev.ErrCorrupt; they never hold the token.
func ParseMemberRequest(b []byte) (*MemberRequest, error) {
	m := &MemberRequest{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, corrupt("member request", err)
	}
	var err error
	switch p := m.Part.(type) {
	case *MemberRequest_Hello:
		err = CheckHello(p.Hello)
	case *MemberRequest_Join:
		if err = checkGroup(p.Join.GetGroup()); err == nil && len(p.Join.GetGrant()) > MaxGrant {
			err = fmt.Errorf("grant of %d bytes, at most %d are allowed", len(p.Join.GetGrant()), MaxGrant)
		}
		if n, m := len(p.Join.GetHave().GetCells()), len(p.Join.GetHave().GetGateways()); err == nil && (n != m || n > MaxHaveCells) {
			err = fmt.Errorf("%d cells with %d sums, at most %d are allowed", n, m, MaxHaveCells)
		}
	case *MemberRequest_Leave:
		err = checkGroup(p.Leave.GetGroup())
	case *MemberRequest_Who:
		err = checkJoined("keys", p.Who.GetKeys(), 1, MaxWho)
	}
	if err != nil {
		return nil, corrupt("member request", err)
	}
	return m, nil
}

// CheckHello finds what a supernode would refuse in a Hello.
func CheckHello(h *Hello) error {
	switch {
	case h.GetToken() == "" || len(h.GetToken()) > MaxToken:
		return fmt.Errorf("token of %d bytes, not 1 to %d", len(h.GetToken()), MaxToken)
	case len(h.GetInstance()) != InstanceLen:
		return fmt.Errorf("instance of %d bytes, not %d", len(h.GetInstance()), InstanceLen)
	}
	if err := CheckLabel("zone", h.GetZone()); err != nil {
		return err
	}
	if err := CheckLabel("rack", h.GetRack()); err != nil {
		return err
	}
	return checkAddrs(h.GetAddrs())
}

// CheckLabel says whether a zone or rack can be sent: it is printable and not
// too long.
func CheckLabel(name, s string) error {
	if len(s) > MaxLabel {
		return fmt.Errorf("%s of %d bytes, at most %d are allowed", name, len(s), MaxLabel)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("%s is not text", name)
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("%s has a character that is not printable", name)
		}
	}
	return nil
}

// ParseMemberEvent reads and checks a MemberEvent, as ParseMemberRequest does.
func ParseMemberEvent(b []byte) (*MemberEvent, error) {
	m := &MemberEvent{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, corrupt("member event", err)
	}
	var err error
	switch p := m.Part.(type) {
	case *MemberEvent_Welcome:
		if ms := p.Welcome.GetLeaseMs(); ms < 1000 || ms > 600_000 {
			err = fmt.Errorf("lease of %d ms, not 1,000 to 600,000", ms)
		}
	case *MemberEvent_Update:
		err = checkUpdate(p.Update)
	case *MemberEvent_Refusal:
		err = checkGroup(p.Refusal.GetGroup())
	case *MemberEvent_Answer:
		if len(p.Answer.GetKey()) != KeyLen {
			err = fmt.Errorf("key of %d bytes, not %d", len(p.Answer.GetKey()), KeyLen)
		} else {
			err = checkJoined("groups", p.Answer.GetGroups(), 0, MaxGroups)
		}
	}
	if err != nil {
		return nil, corrupt("member event", err)
	}
	return m, nil
}

func checkUpdate(u *GroupUpdate) error {
	if err := checkGroup(u.GetGroup()); err != nil {
		return err
	}
	if u.GetVersion() == 0 || u.GetFrom() >= u.GetVersion() {
		return fmt.Errorf("update from version %d to %d", u.GetFrom(), u.GetVersion())
	}
	if u.GetFrom() != 0 && (u.GetKeepMembers() || u.GetKeepCells()) {
		return fmt.Errorf("update from version %d that keeps parts from before", u.GetFrom())
	}
	if err := checkJoined("keys", u.GetLeft(), 0, MaxMemberEvent/KeyLen); err != nil {
		return err
	}
	if err := checkMembers(u.GetJoined()); err != nil {
		return err
	}
	if err := CheckLabel("zone", u.GetZone()); err != nil {
		return err
	}
	for _, c := range u.GetCells() {
		if len(c.GetGateways()) > MaxGateways {
			return fmt.Errorf("cell with %d gateways, at most %d are allowed", len(c.GetGateways()), MaxGateways)
		}
		if err := CheckLabel("zone", c.GetZone()); err != nil {
			return err
		}
		if err := checkMembers(c.GetGateways()); err != nil {
			return err
		}
	}
	return nil
}

func checkMembers(ms []*GroupMember) error {
	for _, m := range ms {
		if len(m.GetKey()) != KeyLen {
			return fmt.Errorf("key of %d bytes, not %d", len(m.GetKey()), KeyLen)
		}
		if err := CheckLabel("rack", m.GetRack()); err != nil {
			return err
		}
		if err := checkAddrs(m.GetAddrs()); err != nil {
			return err
		}
	}
	return nil
}

func checkGroup(b []byte) error {
	if len(b) != digestLen {
		return fmt.Errorf("group of %d bytes, not %d", len(b), digestLen)
	}
	return nil
}

// checkJoined checks items of 32 bytes each that are joined.
func checkJoined(what string, b []byte, least, most int) error {
	if n := len(b); n%KeyLen != 0 || n < least*KeyLen || n > most*KeyLen {
		return fmt.Errorf("%d bytes of %s, not %d to %d times %d", n, what, least, most, KeyLen)
	}
	return nil
}

func checkAddrs(addrs [][]byte) error {
	if len(addrs) > MaxAddrs {
		return fmt.Errorf("%d addresses, at most %d are allowed", len(addrs), MaxAddrs)
	}
	for _, a := range addrs {
		if _, err := ParseAddr(a); err != nil {
			return err
		}
	}
	return nil
}

// Sum returns what a GroupHave's sums are made of: a hash of all that m says.
func (m *GroupMember) Sum() uint64 {
	b := make([]byte, 0, 256)
	b = append(b, m.Key...)
	full := byte(0)
	if m.Full {
		full = 1
	}
	b = append(b, full, byte(len(m.Rack)))
	b = append(b, m.Rack...)
	for _, a := range m.Addrs {
		b = append(append(b, byte(len(a))), a...)
	}
	return sum64(b)
}

// ListSum returns the sum of a list whose members have these, which it sorts.
func ListSum(sums []uint64) uint64 {
	slices.Sort(sums)
	b := make([]byte, 0, 8*len(sums))
	for _, s := range sums {
		b = binary.BigEndian.AppendUint64(b, s)
	}
	return sum64(b)
}

func sum64(b []byte) uint64 {
	h := sha256.Sum256(b)
	return binary.BigEndian.Uint64(h[:])
}

// AppendCell appends c as it is in an encoded GroupUpdate, for AppendUpdate.
func AppendCell(dst []byte, c *GroupCell) ([]byte, error) {
	dst = protowire.AppendTag(dst, 7, protowire.BytesType) // GroupUpdate.cells
	dst = protowire.AppendVarint(dst, uint64(proto.Size(c)))
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(dst, c)
}

// AppendUpdate appends a MemberEvent with the update u, as AppendMessage does, with
// further cells that AppendCell has encoded: the same cells are in many updates.
func AppendUpdate(dst []byte, u *GroupUpdate, cells [][]byte) ([]byte, error) {
	body := proto.Size(u)
	for _, c := range cells {
		body += len(c)
	}
	event := protowire.SizeTag(3) + protowire.SizeBytes(body)
	dst = slices.Grow(dst, protowire.SizeVarint(uint64(event))+event)
	dst = protowire.AppendVarint(dst, uint64(event))
	dst = protowire.AppendTag(dst, 3, protowire.BytesType) // MemberEvent.update
	dst = protowire.AppendVarint(dst, uint64(body))
	dst, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(dst, u)
	for _, c := range cells {
		dst = append(dst, c...)
	}
	return dst, err
}

// AppendAddr returns an address as it is sent. IPv4 addresses take 4 bytes, also
// when they come mapped into IPv6.
func AppendAddr(dst []byte, a netip.AddrPort) []byte {
	dst = append(dst, a.Addr().Unmap().WithZone("").AsSlice()...)
	return binary.BigEndian.AppendUint16(dst, a.Port())
}

// ParseAddr reads an address. What cannot be dialed, such as 0.0.0.0 or port 0,
// is an error that wraps blockdev.ErrCorrupt.
func ParseAddr(b []byte) (netip.AddrPort, error) {
	if len(b) != 6 && len(b) != 18 {
		return netip.AddrPort{}, fmt.Errorf("address of %d bytes, not 6 or 18: %w", len(b), blockdev.ErrCorrupt)
	}
	ip, _ := netip.AddrFromSlice(b[:len(b)-2])
	port := binary.BigEndian.Uint16(b[len(b)-2:])
	if ip.IsUnspecified() || ip.IsMulticast() || port == 0 {
		return netip.AddrPort{}, fmt.Errorf("address %s port %d cannot be dialed: %w", ip, port, blockdev.ErrCorrupt)
	}
	return netip.AddrPortFrom(ip, port), nil
}

// Keys iterates over joined keys, or over joined digests; both have 32 bytes.
func Keys(joined []byte) func(yield func([KeyLen]byte) bool) {
	return func(yield func([KeyLen]byte) bool) {
		for ; len(joined) >= KeyLen; joined = joined[KeyLen:] {
			if !yield([KeyLen]byte(joined)) {
				return
			}
		}
	}
}
