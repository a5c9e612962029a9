package control

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"time"
)

// stateful is a fake that has a State.
type stateful struct {
	fake
	state func(after uint64) State
}

func (f stateful) State(after uint64) State { return f.state(after) }

func TestState(t *testing.T) {
	want := State{
		Version: "v1", NoSupernode: "it is away", Called: time.Unix(1000, 5).UTC(), Last: 18446744073709551615,
		Notices: []Notice{
			{Number: 7, At: time.Unix(1, 0).UTC(), What: Unpacked, Refs: []string{"r/a:1"}, Cause: "slow", Why: "it took too long"},
			{Number: 8, At: time.Unix(2, 0).UTC(), What: ReadFailed, Refs: []string{"r/a:1", "r/b:1"}, Layer: "sha256:ab", Why: "no source", Before: 3},
		},
	}
	var asked []uint64
	c, _ := serve(t, stateful{state: func(after uint64) State {
		asked = append(asked, after)
		return want
	}})
	for _, after := range []uint64{0, want.Last} {
		got, err := c.State(t.Context(), after)
		if err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%v\n%+v, want\n%+v", err, got, want)
		}
	}
	if !reflect.DeepEqual(asked, []uint64{0, want.Last}) {
		t.Errorf("asked for %d", asked)
	}
}

func TestStateOfSupernode(t *testing.T) {
	c, _ := serve(t, fake{status: func(context.Context) (*Status, error) { return &Status{}, nil }})
	if _, err := c.State(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "this is a supernode") {
		t.Errorf("a supernode: %v", err)
	}
}
