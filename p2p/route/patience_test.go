package route

import (
	"testing"
	"time"
)

// TestPatienceComesBack: a link that was full makes a node wait longer, and some
// hundreds of good answers later it is as quick to go elsewhere as before.
func TestPatienceComesBack(t *testing.T) {
	b := NewBook(BookOptions{})
	learn := func(n int, took time.Duration) (giveUp time.Duration) {
		for range n {
			b.learn(true, took, 64<<10)
			_, giveUp = b.Patience(true)
		}
		return giveUp
	}
	before := learn(100, 2*time.Millisecond)
	if full := learn(64, time.Second); full < time.Second {
		t.Errorf("answers take 1 s, and it gives up after %v", full)
	}
	if after := learn(1000, 2*time.Millisecond); after != before {
		t.Errorf("it gives up after %v, and after %v as long as a link was full and 1000 answers later", before, after)
	}
}

// A peer that was left out is in doubt until it answers: one slow answer is enough then to
// leave it out again, for longer.
func TestDoubtful(t *testing.T) {
	b := NewBook(BookOptions{})
	const id = "peer"
	if b.Doubtful(id) {
		t.Error("a stranger is in doubt")
	}
	for range slowLimit - 1 {
		b.Judge(id, Slow, 0)
	}
	if b.Doubtful(id) || b.Out(id, 0) {
		t.Error("in doubt after less than a failure")
	}
	b.Judge(id, Slow, 0)
	if !b.Doubtful(id) || !b.Out(id, 0) || b.Out(id, deadFor) {
		t.Error("not left out, or for too long")
	}
	b.Judge(id, Slow, deadFor)
	if !b.Out(id, 2*deadFor) || b.Out(id, 3*deadFor) {
		t.Error("the second time is not twice as long as the first")
	}
	b.Judge(id, OK, 3*deadFor)
	if b.Doubtful(id) {
		t.Error("in doubt after a good answer")
	}
	b.Judge(id, Slow, 3*deadFor)
	if b.Out(id, 3*deadFor) {
		t.Error("left out for one slow answer among good ones")
	}
}
