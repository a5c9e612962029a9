package wire

import (
	"fmt"

	"github.com/shoalfs/shoal/internal/image"
)

// MaxRelays is how many relays an ImageHeader may name.
const MaxRelays = 4

// NewRelays puts relays into messages.
func NewRelays(relays []image.Relay) []*Relay {
	var ms []*Relay
	for _, r := range relays {
		m := &Relay{Key: r.Key[:]}
		for _, a := range r.Addrs {
			m.Addrs = append(m.Addrs, AppendAddr(nil, a))
		}
		ms = append(ms, m)
	}
	return ms
}

// ParseRelays is the inverse of NewRelays. Errors wrap blockdev.ErrCorrupt.
func ParseRelays(ms []*Relay) ([]image.Relay, error) {
	if err := checkRelays(ms); err != nil {
		return nil, corrupt("relays", err)
	}
	var relays []image.Relay
	for _, m := range ms {
		r := image.Relay{Key: Key(m.Key)}
		for _, b := range m.Addrs {
			a, err := ParseAddr(b)
			if err != nil {
				return nil, err
			}
			r.Addrs = append(r.Addrs, a)
		}
		relays = append(relays, r)
	}
	return relays, nil
}

func checkRelays(ms []*Relay) error {
	if len(ms) > MaxRelays {
		return fmt.Errorf("%d relays, at most %d are allowed", len(ms), MaxRelays)
	}
	for _, m := range ms {
		if len(m.GetKey()) != KeyLen || len(m.GetAddrs()) == 0 {
			return fmt.Errorf("relay with a key of %d bytes and %d addresses", len(m.GetKey()), len(m.GetAddrs()))
		}
		if err := checkAddrs(m.GetAddrs()); err != nil {
			return err
		}
	}
	return nil
}
