package exchange

import "time"

// deadline renews a stream's deadline only when a quarter of it is gone: each
// renewal makes a timer, which for every chunk is a sizeable part of the work.
// What it guards therefore has between three quarters of the limit and all of it.
type deadline struct {
	limit time.Duration
	at    time.Time
}

// renew calls set if it is time to.
func (d *deadline) renew(set func(time.Time) error) error {
	now := time.Now()
	if d.at.Sub(now) >= d.limit*3/4 {
		return nil
	}
	d.at = now.Add(d.limit)
	return set(d.at)
}
